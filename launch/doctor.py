"""Look at a machine before a job does: versions, devices, backends, threads, room, optional packages, two real ranks.

    python -m launch.doctor               a table, and what to do about each thing that is wrong
    python -m launch.doctor --json        the same for programs: {"status", "checks": [{name, status, found, advice}]}
    python -m launch.doctor --folder DIR  look for room where runs will go

Exit codes: 0 well, 1 a check failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.doctor_checks import Check, host_checks, worst
from launch.doctor_ranks import self_test
from launch.errors import EXIT_CHECK_FAILED, EXIT_WELL, as_program

_COLOURS = {"ok": "green", "note": "yellow", "failed": "red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print them; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will go; by default runs")
    args = parser.parse_args(argv)
    checks = [*host_checks(args.folder), self_test()]
    if args.json:
        print(json.dumps({"status": worst(checks), "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print_checks(Console(), checks)
    return EXIT_CHECK_FAILED if worst(checks) == "failed" else EXIT_WELL


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """Print the checks as a table, and what to do below each thing that is not as it should be."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(check.status, _COLOURS[check.status]), Text(check.found))
        if check.advice:
            table.add_row("", "", Text(check.advice, "dim"))
    console.print(table)
    failed = [check.name for check in checks if check.status == "failed"]
    console.print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "Nothing failed.")


if __name__ == "__main__":
    as_program(main)
