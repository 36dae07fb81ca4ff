"""What the parts of a save take from training that computes on every core without a pause: its floor on such a machine.

    python -m benchmarks.checkpoint_bound [--rounds N] [--json FILE]

Two ranks of one thread train SmolLM2-135M's shape, as in `benchmarks.checkpoint --only blocked --window 1`; beside a
step, a plain thread of each does one part of what a save has to do with the bytes of its half of the state: copy
them into buffers, hash, write buffers past the page cache, all three, or hash and write memory where it lies, without a
copy. Nothing of this library is in those; a save of it is the last part. Parts take turns, round by round; what is lost
is how much longer the slower rank's step is than the slower rank's step without a part beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint_bound_rank import PARTS, RANKS
from benchmarks.claims import write_report
from benchmarks.ranks import run_ranks

DEADLINE_S = 1800


def lost_ms(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return, by part, how much longer the step of every round was, in milliseconds."""
    slowest: dict[tuple[int, str], float] = {}
    for row in rows:
        at = row["round"], row["part"]
        slowest[at] = max(slowest.get(at, 0.0), row["step_s"])
    rounds = sorted({row["round"] for row in rows})
    return {part: [1e3 * (slowest[r, part] - slowest[r, PARTS[0]]) for r in rounds] for part in PARTS[1:]}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/checkpoint_bound.json"), metavar="FILE")
    given = parser.parse_args()
    options = {"rounds": given.rounds}
    rows = run_ranks("benchmarks.checkpoint_bound_rank", options, ranks=RANKS, deadline_s=DEADLINE_S)
    size = f"{rows[0]['num_bytes'] / 1e9:.2f} GB"
    print(f"| part, {size} beside each of {RANKS} training ranks | lost, ms | least to most |\n|---|---|---|")
    for part, lost in lost_ms(rows).items():
        print(f"| {part} | {median(lost):.0f} | {min(lost):.0f} to {max(lost):.0f} |")
    write_report(given.json, rows=rows, claims=[])


if __name__ == "__main__":
    main()
