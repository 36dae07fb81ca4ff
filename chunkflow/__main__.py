"""`python -m chunkflow`: see `chunkflow.cli`."""

from chunkflow.cli import main

if __name__ == "__main__":
    main()
