"""Every benchmark that runs on a CPU, one after another; then docs/figures.md and README's table from all results.

``--tables-only`` measures nothing and writes the tables from benchmarks/results alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from figures import write_tables

SCRIPTS = ("export.py", "step_cpu.py", "prefill_cpu.py", "batch_cpu.py", "quant_cpu.py", "demo_model.py")


def main() -> None:
    """Run the scripts with the arguments given here; stop at the first that fails."""
    given = sys.argv[1:]
    for script in () if "--tables-only" in given else SCRIPTS:
        print(f"\n== {script}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / script), *given], check=True)
    write_tables()


if __name__ == "__main__":
    main()
