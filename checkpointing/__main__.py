"""`python -m checkpointing`: the `checkpoint` command."""

from checkpointing.cli import main

if __name__ == "__main__":
    main()
