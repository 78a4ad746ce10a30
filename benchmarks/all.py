"""Every benchmark that runs on a CPU, one after another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("export.py", "step_cpu.py", "prefill_cpu.py", "batch_cpu.py", "demo_model.py")


def main() -> None:
    """Run the scripts with the arguments given here; stop at the first that fails."""
    for script in SCRIPTS:
        print(f"\n== {script}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / script), *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
