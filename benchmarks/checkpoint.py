"""Saving and loading a training state: this library beside torch's, Meta's, Hugging Face's and DeepSpeed's.

    python -m benchmarks.checkpoint [--quick] [--only PART] [--ways A,B] [--state NAME] [--rounds N] [--json FILE]

blocked   seconds a save takes from training: the call, the fence, and how much longer the steps beside it last
durable   seconds until every byte is on the device, beside a raw O_DIRECT writer; CPU time, memory, commit, hashing
train     training steps with a save before each, and without
fence     what a fence costs that comes before the bytes are written
small     20,000 tensors of 256 bytes, saved and loaded
load      the whole state from a cold page cache, beside a raw O_DIRECT reader

Two ranks. Rounds are interleaved, and rows are added to those that are in FILE already (`--fresh` begins anew), so that
a part can be measured in several sittings; the claims are made from all of them. Rows during which other programs took
more than 5% of a core are kept in FILE and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_claims import claims_of
from benchmarks.checkpoint_tables import is_alone, plot, print_tables
from benchmarks.claims import print_claims, write_report
from benchmarks.ranks import start_rank

DEADLINE_S = 3600
ROUNDS = {"blocked": 30, "durable": 9, "train": 5, "fence": 3, "small": 3, "load": 7}
PARTS = tuple(ROUNDS)
WAYS = (
    "ours",
    "torch.save",
    "safetensors",
    "DCP",
    "DCP thread",
    "DCP process",
    "DCP DefaultStager",
    "torch_checkpointing",
    "torchsnapshot",
    "DeepSpeed",
)


def run_part(part: str, arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Run a part on two ranks, and `keep` its rows; also those of a part that was ended early."""
    ways = arguments.ways.split(",") if arguments.ways else list(_default_ways(part, quick=arguments.quick))
    state = "small" if part == "small" else arguments.state
    options = {
        "part": part,
        "quick": arguments.quick,
        "ways": ways,
        "state": "0.1" if arguments.quick and state == "smollm" else state,
        "rounds": arguments.rounds or (2 if arguments.quick else ROUNDS[part]),
        "seconds": arguments.seconds,
        "tokens": arguments.tokens,
        "window": arguments.window or {"blocked": 2, "train": 6}.get(part, 1),
        "busy": arguments.busy,
        "verbose": arguments.verbose,
    }
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=arguments.folder))
    environment = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "benchmarks.checkpoint_rank"]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(2):
            arguments_of = [str(rank), str(folder), json.dumps(options)]
            ranks.append(start_rank([*command, *arguments_of], environment, own_session=True))
        codes = [rank.wait(DEADLINE_S) for rank in ranks]
        if any(codes):
            raise RuntimeError(f"the ranks of {part} ended with {codes}")
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)  # and the processes that peers started
                rank.wait()
        rows = folder / "rows.jsonl"
        if rows.exists():
            keep([json.loads(line) for line in rows.read_text().splitlines()])
        shutil.rmtree(folder, ignore_errors=True)


def _default_ways(part: str, *, quick: bool) -> tuple[str, ...]:
    if part == "train":
        return ("ours",)
    if part == "load":
        return tuple(way for way in WAYS if not way.startswith("DCP ")) if not quick else ("ours", "DCP")
    return ("ours", "torch.save", "DCP") if quick else WAYS


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small state, three ways, two rounds: under a minute")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--ways", default="", metavar="A,B", help=f"of: {', '.join(WAYS)}")
    parser.add_argument("--state", default="smollm", help="smollm, or the GB of a synthetic state (default: smollm)")
    parser.add_argument("--rounds", type=int, default=0, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="begin no round that would end later, in each part"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens a rank and step of smollm")
    parser.add_argument("--window", type=int, default=0, help="steps beside a save (blocked), or in a row (train)")
    parser.add_argument("--busy", default="wait", choices=("wait", "skip", "replace"), help="policy, for train")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/checkpoint.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="default: beside the JSON, .png")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are in FILE")
    parser.add_argument("--report", action="store_true", help="measure nothing; report what is in FILE")
    parser.add_argument("--verbose", action="store_true", help="print every row")
    arguments = parser.parse_args()
    unknown = set(filter(None, arguments.ways.split(","))) - set(WAYS)
    if unknown:
        parser.error(f"--ways has {', '.join(sorted(unknown))}; there are: {', '.join(WAYS)}")
    # So that the ranks are gone when someone ends this, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = [] if arguments.fresh or not arguments.json.exists() else json.loads(arguments.json.read_text())["rows"]

    def keep(found: list[dict[str, Any]]) -> None:
        sitting = 1 + max((row["sitting"] for row in rows), default=0)
        rows.extend({**row, "sitting": sitting} for row in found)
        write_report(arguments.json, rows=rows, claims=[])

    quick_parts = tuple(part for part in PARTS if part != "fence") if arguments.quick else PARTS
    for part in () if arguments.report else (arguments.only,) if arguments.only else quick_parts:
        run_part(part, arguments, keep)
    alone = [row for row in rows if is_alone(row)]
    print(f"{len(rows)} rows, {len(rows) - len(alone)} of them left out: other programs were running")
    print_tables(alone)
    claims = claims_of(alone)
    print_claims(claims)
    write_report(arguments.json, rows=rows, claims=claims)
    print(f"rows and claims: {arguments.json}")
    picture = arguments.plot or arguments.json.with_suffix(".png")
    if plot(alone, picture):
        print(f"plot: {picture}")
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
