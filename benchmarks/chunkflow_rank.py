"""One rank of `benchmarks.chunkflow`: measure the kernels, prepare every way, run them in turn, report.

python -m benchmarks.chunkflow_rank RANK FOLDER OPTIONS        (started by benchmarks.chunkflow)
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.chunkflow_bound import Rates, measure_rates
from benchmarks.chunkflow_ways import WAYS, Job
from benchmarks.chunkflow_work import CAP_BYTES, Shape, Work, data_set, model_of, samples_of
from chunkflow.memory import peak_resident_bytes, reset_peak, resident_bytes

WORLD_SIZE = 2
WARM_UP = 24
"""Sequences of the warming step, 16 to 39 tokens."""


def main() -> None:
    """Join the world, run every round, let rank 0 write the rows as they come."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # layers of several models, with and without gradients
    where = f"file://{folder.resolve() / 'store'}"
    wait = timedelta(seconds=900)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD_SIZE, timeout=wait)
    shape = Shape(*options["shape"])
    data = data_set(options["data"], quick=options["quick"])
    models = {(r, c): model_of(shape, recompute=r, compiled=c) for r in (False, True) for c in (False, True)}
    rates = mean_rates(measure_rates(shape))
    job = Job(samples_of(data.lengths, shape), rank, WORLD_SIZE, models, rates.pair_cost)
    warm = Job(samples_of(range(16, 16 + WARM_UP), shape), rank, WORLD_SIZE, models, rates.pair_cost)
    touch_memory()
    works = []
    for way, setting in options["ways"]:
        WAYS[way](warm, setting).run()
        works.append((way, setting, WAYS[way](job, setting)))
    for number in range(options["rounds"]):
        rates = mean_rates(measure_rates(shape))  # anew: a virtual machine is not as fast now as it was minutes ago
        if rank == 0:
            print(json.dumps({"rates": asdict(rates), "pair_cost": rates.pair_cost}), flush=True)
        turned = works[number % len(works) :] + works[: number % len(works)]
        for way, setting, work in turned:
            row = {"part": data.name, "round": number, "way": way, "setting": setting, **measured(work, rates)}
            if rank == 0:
                with (folder / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
            for model in models.values():
                model.zero_grad(set_to_none=True)
    dist.barrier()
    dist.destroy_process_group()


def touch_memory() -> None:
    """Use as much memory as any way may, once: a virtual machine is slow to get pages that it never had."""
    torch.ones(CAP_BYTES // 4)


def measured(work: Work, rates: Rates) -> dict[str, Any]:
    """Run one step; return its time, tokens and peak over all ranks, and what the model of the hardware says."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that the peak is this step's
    base = resident_bytes()
    reset_peak()
    dist.barrier()
    began = time.perf_counter()
    loss = work.run()
    dist.barrier()
    seconds = time.perf_counter() - began
    mine = [
        rates.seconds(work.load),
        rates.code_seconds(work.load),
        float(peak_resident_bytes() - base),
        float(work.tokens),
        seconds,
    ]
    every = [torch.zeros(len(mine), dtype=torch.float64) for _ in range(WORLD_SIZE)]
    dist.all_gather(every, torch.tensor(mine, dtype=torch.float64))
    predicted, by_code, peaks, tokens, times = torch.stack(every).T
    return {
        "seconds": times.max().item(), "tokens": int(tokens.sum()), "loss": loss,
        "peak_bytes": int(peaks.max()), "bound_s": predicted.max().item(),
        "balanced_s": predicted.mean().item(), "code_s": by_code.max().item(),
    }  # fmt: skip


def mean_rates(rates: Rates) -> Rates:
    """Return the mean of the ranks' rates: they ran side by side, and all ranks plan by the same numbers."""
    mine = torch.tensor(list(asdict(rates).values()), dtype=torch.float64)
    dist.all_reduce(mine)
    return Rates(*(mine / WORLD_SIZE).tolist())


if __name__ == "__main__":
    main()
