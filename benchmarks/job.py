"""One job with everything in it: beside transformers' Trainer, beside the plainest loop, and from start to first step.

    python -m benchmarks.job [--quick] [--only train|features|startup] [--scan] [--rounds N] [--add] [--report]
                            [--json FILE]

train     SmolLM2's first four layers, real weights, on functions and classes of the standard library as in
          recipes/smollm2.yaml, two ranks under torchrun: launch.finetune with chunks, lazy checkpoints, metrics and
          report, in turn with Trainer (group_by_length, activation checkpointing, its best batch size, its own
          checkpoints); a checkpoint every 10 steps on both sides, one memory cap, the same samples. The clock runs from
          the first batch asked for until the last checkpoint is written (ours: durable).
features  rows of equal length, a rank's step in one chunk, where nothing can be split, padded or overlapped: the whole
          job against DDP loops written by hand, over the same batches, in the same processes.
startup   from the start of torchrun to the first step, less what a bare script takes that imports torch and
          transformers and loads the model.

`--scan` runs settings of both sides of `train` once each instead. `--report` prints what FILE has. What is measured
replaces the rows of the same part in FILE; with `--add` it is further rounds of them. Exit codes: 0, or 1 where a
target is missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import job_features, job_startup, job_train
from benchmarks.claims import print_claims, write_report
from benchmarks.job_report import claims_of, print_tables

Row = dict[str, Any]
PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "train": job_train.measure,
    "features": job_features.measure,
    "startup": job_startup.measure,
    "scan": job_train.scan,
}
ROUNDS = {"train": 1, "features": 4, "startup": 3}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; about a minute")
    parser.add_argument("--only", choices=ROUNDS, action="append", help="one part; repeatable")
    parser.add_argument("--scan", action="store_true", help="settings of `train`, once each")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help=f"default: {ROUNDS}")
    parser.add_argument("--add", action="store_true", help="keep the rounds that FILE has")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/job.json"), metavar="FILE")
    parser.add_argument("--report", action="store_true", help="measure nothing; report what is in the JSON file")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are gone when someone ends this, too
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    for part in [] if given.report else ["scan"] if given.scan else given.only or ROUNDS:
        same = [row for row in rows if (row["part"], row["quick"]) == (part, given.quick)]
        first = 1 + max((row["round"] for row in same), default=-1) if given.add else 0
        rows = rows if given.add else [row for row in rows if row not in same]
        rounds = given.rounds or (1 if given.quick or part == "scan" else ROUNDS[part])
        for row in PARTS[part](numbers=range(first, first + rounds), quick=given.quick):
            rows.append(row)
            print(brief(row), flush=True)
            write_report(given.json, rows=rows, claims=[])
    print_tables(rows)
    claims = claims_of(rows)
    print_claims(claims)
    write_report(given.json, rows=rows, claims=claims)
    print(f"rows and claims: {given.json}")
    sys.exit(0 if all(claim.met for claim in claims) else 1)


def brief(row: Row) -> str:
    """Return a row as one line, while others are still measured."""
    shown = {key: value for key, value in row.items() if key not in ("periods", "losses", "rates", "metrics")}
    return json.dumps(shown)


if __name__ == "__main__":
    main()
