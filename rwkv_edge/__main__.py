"""``rwkv-edge`` and ``python -m rwkv_edge``: the command line."""

import sys


def main() -> None:
    """Entry point: every expected failure is one sentence and an exit code."""
    try:
        from rwkv_edge.cli import run

        code = run()
    except KeyboardInterrupt:  # while modules were read
        sys.stderr.write("stopped\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
