"""``python -m rwkv_edge``: the command line."""

from rwkv_edge.cli import main

if __name__ == "__main__":
    main()
