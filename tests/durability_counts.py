"""Run the proofs of the durability contract and write their counts into docs/durability.md.

    python -m tests.durability_counts                 every proof, `slow` and `soak` included; an hour
    python -m tests.durability_counts --junit A.xml B.xml     from earlier runs (pytest --junitxml)

A proof tells its counts by `record_property`. The date is that of the run.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.spawn import ROOT

PAGE = ROOT / "docs" / "durability.md"
BEGIN, END = "<!-- counts: written by python -m tests.durability_counts -->", "<!-- end of counts -->"
PROOFS = {
    "crash_states": ("test_checkpointing_crash_states", "every state a crash could leave, from a record of the calls"),
    "nth_call": ("test_checkpointing_faults", "the N-th system call, allocation or thread fails, once and for ever"),
    "kill": ("test_checkpointing_kill", "`kill -9` at random under torchrun's agent; resumes compared bit by bit"),
    "strace": ("test_checkpointing_strace", "the kernel kills, or returns an error, at the N-th call"),
    "power_cut": ("test_checkpointing_powercut", "a loop device's backing file, copied when `wait` returns"),
    "corruption": ("test_checkpointing_corruption", "every region of every file, damaged in every way"),
    "fuzz": ("test_checkpointing_fuzz", "readers given changed manifests and objects"),
    "lost": ("test_checkpointing_lost", "a rank, or the store's host, stopped or killed in every phase of a call"),
    "bad_input": ("test_checkpointing_bad_input", "hostile folders, full and read-only disks"),
}
"""By the name of the property: (the test file, what is done)."""


@dataclass
class Found:
    """What came of one file of tests."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, counts: dict[str, Any]) -> None:
        """Sum up; of seconds the longest."""
        for name, value in counts.items():
            if isinstance(value, int | float):
                old = self.counts.get(name, 0)
                self.counts[name] = max(old, value) if name.endswith("_s") else old + value


def read(reports: list[Path]) -> tuple[dict[str, Found], list[dict[str, Any]]]:
    """Return what each proof found, and the rows of ckpt-chaos. The last report of a test counts."""
    cases: dict[tuple[str, str], ElementTree.Element] = {}
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            cases[case.get("classname", "").rpartition(".")[2], case.get("name", "")] = case
    found: dict[str, Found] = defaultdict(Found)
    chaos: list[dict[str, Any]] = []
    for (file, _), case in cases.items():
        one = found[file]
        one.failed += any(case.find(kind) is not None for kind in ("failure", "error"))
        one.skipped += case.find("skipped") is not None
        one.passed += all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
        for own in case.iter("property"):
            counts = ast.literal_eval(own.get("value", "{}"))
            if own.get("name") == "chaos":
                chaos.append(counts)
            else:
                one.add(counts)
    return found, chaos


def table(found: dict[str, Found], chaos: list[dict[str, Any]], date: str) -> str:
    """Return the lines of the page."""
    lines = [f"Run of {date}.", "", "| proof | tests passed, failed, skipped | counted |", "|---|---|---|"]
    for file, what in PROOFS.values():
        one = found.get(file, Found())
        counts = ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" if name.endswith("_s") else
                           f"{name.replace('_', ' ')} {value:,}" for name, value in one.counts.items())  # fmt: skip
        lines.append(f"| {what}: `tests/{file}.py` | {one.passed}, {one.failed}, {one.skipped} | {counts or '-'} |")
    if chaos:
        lines += ["", "`ckpt-chaos` on a small job of each library (`python -m tests.chaos`):", ""]
        verdicts = ("points", "PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")
        lines += [f"| library | {' | '.join(verdicts)} |", f"|---|{'---|' * len(verdicts)}"]
        for row in chaos:
            lines.append(f"| {row['library']} | {' | '.join(str(row.get(one, '-')) for one in verdicts)} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the lines between the marks of the page."""
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Run what is asked for; exit 1 when a proof failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", nargs="+", type=Path, help="reports of earlier runs, instead of running")
    parser.add_argument("--chaos", type=Path, help="what python -m tests.chaos printed, with --junit")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reports = given.junit
        if reports is None:
            reports = [Path(folder) / "report.xml"]
            files = [f"tests/{file}.py" for file, _ in PROOFS.values()] + ["tests/test_checkpointing_chaos.py"]
            every = ["-m", "slow or soak or not slow", "-o", "junit_family=xunit1", "--junitxml", str(reports[0])]
            subprocess.run([sys.executable, "-m", "pytest", *files, *every], cwd=ROOT, check=False)
        found, chaos = read(reports)
    if given.chaos is not None:
        chaos += [json.loads(line) for line in given.chaos.read_text().splitlines()]
    write(table(found, chaos, given.date))
    return int(any(one.failed for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
