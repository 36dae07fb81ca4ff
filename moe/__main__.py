"""`python -m moe`."""

from moe.cli import main

main()
