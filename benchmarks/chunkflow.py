"""Training in chunks, end to end, beside what people use; and its memory over the length of the longest sequence.

    python -m benchmarks.chunkflow [--quick] [--only lmsys|stdlib|memory] [--scan] [--rounds N] [--add]
                                   [--json FILE] [--plot FILE]

`lmsys` and `stdlib`: one optimizer step over one global batch of those lengths, on two ranks of one thread, by ours and
by three peers (`benchmarks.chunkflow_ways`), in turn, round by round; data is ready before the clock starts. Every way
stays under the same memory cap (`CAP_BYTES` of `benchmarks.chunkflow_work`: of a rank, above model, gradients and
data), set so that the longest sequence needs recompute. `--scan` runs every setting of every way once instead; the
settings in `BEST` are the fastest of it, or within its noise. Beside every ratio stands what a model of the
hardware gives for it (`benchmarks.chunkflow_bound`). `memory`: how the peak grows from 32 to 256 chunks
(`benchmarks.chunk_memory`). `--add` keeps the rows that are in FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.chunk_memory import measure_slope
from benchmarks.chunkflow_report import claims_of, plot, print_scan, print_table
from benchmarks.claims import print_claims, write_report
from benchmarks.ranks import start_rank, wait_for

PARTS = ("lmsys", "stdlib", "memory")
SHAPE, QUICK_SHAPE = (256, 2, 4096), (128, 2, 1024)
"""Hidden size, layers, vocabulary."""
DEADLINE_S = 3600

Ways = Sequence[tuple[str, Mapping[str, int]]]

BEST: Ways = [
    ("ours", {"chunk_tokens": 2048, "retain": 16, "compiled": 1}),
    ("packed", {"row_tokens": 512, "recompute": 0, "compiled": 1}),
    ("single", {"compiled": 1}),
    ("padded", {"batch": 1, "compiled": 1}),
]
TRIED: Ways = [
    *[("ours", {"chunk_tokens": c, "retain": k}) for c, k in ((1024, 32), (2048, 16), (4096, 8))],
    *[("padded", {"batch": b}) for b in (1, 2)],
    *[("packed", {"row_tokens": n, "recompute": r}) for n, r in ((512, 0), (512, 1), (1024, 0), (2048, 0))],
    ("single", {}),
]
SCAN: Ways = [(way, {**setting, "compiled": c}) for way, setting in TRIED for c in (0, 1)]


def run_steps(part: str, ways: Ways, *, quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Run ways in turn on two ranks; return their rows."""
    shape = QUICK_SHAPE if quick else SHAPE
    options = json.dumps({"data": part, "quick": quick, "shape": shape, "ways": ways, "rounds": rounds})
    with tempfile.TemporaryDirectory(prefix="chunkflow-bench-") as folder, ExitStack() as started:
        ranks = []
        for rank in range(2):
            command = [sys.executable, "-m", "benchmarks.chunkflow_rank", str(rank), folder, options]
            process = start_rank(command)
            started.callback(process.wait)
            started.callback(process.kill)
            ranks.append(process)
        wait_for(ranks, deadline_s=DEADLINE_S)
        lines = (Path(folder) / "rows.jsonl").read_text().splitlines()
    return [{**json.loads(line), "quick": quick} for line in lines]


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and data, one round; within a minute")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--scan", action="store_true", help="run every setting once, instead of the best ones")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--add", action="store_true", help="keep the rows that FILE has, and add these")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/chunkflow.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="default: beside the JSON, .png")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick or arguments.scan else arguments.rounds
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.add and arguments.json.exists() else []
    for part in [arguments.only] if arguments.only else PARTS:
        if part == "memory":
            rows += [{"part": "memory", **row} for row in measure_slope(quick=arguments.quick)]
        else:
            ways = SCAN if arguments.scan else BEST
            rows += run_steps(part, ways, quick=arguments.quick, rounds=rounds)
            (print_scan if arguments.scan else print_table)(rows, part, quick=arguments.quick)
    claims = [] if arguments.scan else claims_of(rows)
    print_claims(claims)
    write_report(arguments.json, rows=rows, claims=claims)
    print(f"rows and claims: {arguments.json}")
    if not arguments.scan:
        picture = arguments.plot or arguments.json.with_suffix(".png")
        plot(rows, picture)
        print(f"plot: {picture}")
    sys.exit(0 if all(c.met for c in claims) else 1)


if __name__ == "__main__":
    main()
