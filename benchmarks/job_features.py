"""The second part of `benchmarks.job`: every feature on, where none can help, against the plainest loops.

torchrun ... -m benchmarks.job_features FOLDER OPTIONS        (one rank; started by benchmarks.job)
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.job_data import equal, flags, model_folder
from benchmarks.job_ours import Probe
from benchmarks.job_plain import WAYS, Place, Seen, periods_of
from benchmarks.job_report import FULL
from benchmarks.job_runs import WORLD_SIZE, tell, torchrun
from benchmarks.job_train import LR, common
from launch import finetune
from launch.env import World, joined, read_processes
from launch.metrics import read_metrics
from launch.step_times import PARTS
from launch.stop import StopSignals

Row = dict[str, Any]
DEADLINE_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is trained by each way in a round."""

    steps: int
    row_tokens: int
    global_batch: int

    @property
    def chunk_tokens(self) -> int:
        """All rows of a rank's step: one product for all of them, as DDP's batch has."""
        return self.row_tokens * self.global_batch // WORLD_SIZE


SIZE, QUICK = Size(steps=8, row_tokens=256, global_batch=4), Size(steps=6, row_tokens=128, global_batch=4)


def measure(*, numbers: Sequence[int], quick: bool) -> Iterator[Row]:
    """Run every way in turn, in the same two processes."""
    size, model = (QUICK if quick else SIZE), model_folder(quick=quick)
    data = equal(model, rows=size.steps * size.global_batch, length=size.row_tokens, quick=quick)
    options = {
        "model": str(model), "data": str(data.path), "chunk_tokens": size.chunk_tokens,
        "row_tokens": size.row_tokens, "global_batch": size.global_batch, "lr": LR, "numbers": list(numbers),
    }  # fmt: skip
    reports = torchrun("benchmarks.job_features", [json.dumps(options)], deadline_s=DEADLINE_S)
    for row in reports[0]["rows"]:
        yield {"part": "features", "quick": quick, **options, **row}


def main() -> None:
    """Run all rounds on this rank."""
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    processes, rows = read_processes(), []
    with StopSignals() as stop, joined(processes) as world:
        place = Place(
            rank=world.rank, world_size=world.world_size, model=Path(options["model"]), data=Path(options["data"]),
            chunk_tokens=options["chunk_tokens"], row_tokens=options["row_tokens"],
            global_batch=options["global_batch"], lr=options["lr"],
        )  # fmt: skip
        names = [FULL, *WAYS]
        for number in options["numbers"]:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seen, parts = whole_job(place, world, stop) if name == FULL else (WAYS[name](place), {})
                rows.append({"way": name, "round": number, "seconds": median(seen.periods), "parts": parts,
                             "periods": seen.periods, "losses": seen.losses})  # fmt: skip
                gc.collect()
    tell(folder, processes.rank, {"rows": rows})


def whole_job(place: Place, world: World, stop: StopSignals) -> tuple[Seen, dict[str, float]]:
    """Run launch.finetune in this world; return its steps, and the mean seconds of their parts.

    Checkpoints are on, and none is due before the last step has begun.
    """
    probe = Probe()
    with tempfile.TemporaryDirectory(prefix="bench-job-") as folder:
        # One folder for all ranks: that of rank 0.
        run = Path(world.board.gather("folder of a run", folder)[0]) / "run"
        settings = {
            "chunks.chunk_tokens": place.chunk_tokens, "chunks.global_batch": place.global_batch,
            "checkpoint.every": 1000, "run.eval_every": 1000, "optimizer.lr": place.lr, "optimizer.weight_decay": 0.0,
            "schedule.kind": "constant", "schedule.warmup_steps": 0, **common(place.model, place.data, run),
        }  # fmt: skip
        with probe.watching(), redirect_stdout(StringIO()):
            finetune.run(flags(settings), world, stop)
        parts = means(read_metrics(run / "metrics.jsonl")) if world.rank == 0 else {}
        world.board.gather("a run is read", True)
    return Seen(periods_of(probe.steps), probe.losses), parts


def means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean seconds of each part, over the steps whose periods count: not the first and the last one."""
    counted = [line for line in metrics if "loss" in line][1:-1]
    return {part: fmean(line[f"seconds.{part}"] for line in counted) for part in PARTS}


if __name__ == "__main__":
    main()
