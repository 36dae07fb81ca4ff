"""What the parts of a save take from training that computes on every core without a pause: its floor on such a machine.

    python -m benchmarks.checkpoint_bound [--gb N] [--rounds N] [--json FILE]

Two ranks of one thread multiply matrices; beside each, a plain thread does one part of what a save has to do with N GB
(default: 0.8, half the state of SmolLM2-135M with AdamW): copy it into buffers, hash it, write buffers past the page
cache, all three, or hash and write memory where it lies, without a copy. Nothing of this library is in it. Parts take
turns, round by round; what is lost is the work that a window has less than the window without a part beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint_bound_rank import PARTS, RANKS, WINDOW_S
from benchmarks.claims import write_report
from benchmarks.ranks import run_ranks

DEADLINE_S = 1800


def lost_ms(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return, by part, what every round lost, in milliseconds of the slower rank."""
    done = {(row["round"], row["part"], row["rank"]): row["done"] for row in rows}
    rounds = sorted({row["round"] for row in rows})
    ranks = sorted({row["rank"] for row in rows})
    return {
        part: [max(1e3 * WINDOW_S * (1 - done[r, part, k] / done[r, PARTS[0], k]) for k in ranks) for r in rounds]
        for part in PARTS[1:]
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.8, help="of each rank (default: 0.8)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/checkpoint_bound.json"), metavar="FILE")
    given = parser.parse_args()
    options = {"gb": given.gb, "rounds": given.rounds}
    rows = run_ranks("benchmarks.checkpoint_bound_rank", options, ranks=RANKS, deadline_s=DEADLINE_S)
    print(f"| part, {given.gb:g} GB beside each of {RANKS} computing ranks | lost, ms | least to most |\n|---|---|---|")
    for part, lost in lost_ms(rows).items():
        print(f"| {part} | {median(lost):.0f} | {min(lost):.0f} to {max(lost):.0f} |")
    write_report(given.json, rows=rows, claims=[])


if __name__ == "__main__":
    main()
