"""One rank that measures what the job's bound is made of: bare kernels, and what every step does to every weight.

python -m benchmarks.job_rates RANK FOLDER OPTIONS        (started by benchmarks.job)
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from benchmarks.chunkflow_bound import rates_of
from benchmarks.chunkflow_rank import mean_rates
from benchmarks.job_runs import WORLD_SIZE

ROWS = 512
"""Of the measured products: a chunk's; the output projection's would take minutes with more."""
REPEATS = 4


def main() -> None:
    """Join the world, measure, let rank 0 write the row."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder.resolve() / 'store'}", rank=rank, world_size=WORLD_SIZE,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32).train()
    update_s, reduce_s = weight_seconds(model)
    row = {"rates": asdict(mean_rates(rates_of(model, rows=ROWS))), "update_s": update_s, "reduce_s": reduce_s}
    if rank == 0:
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def weight_seconds(model: Any) -> tuple[float, float]:
    """Return the seconds of one fused step of AdamW, and of adding up the gradient over the ranks in one piece."""
    flat = torch.zeros(sum(p.numel() for p in model.parameters()), requires_grad=True)
    flat.grad = torch.randn_like(flat)
    optimizer = torch.optim.AdamW([flat], fused=True)
    return _seconds(optimizer.step), _seconds(lambda: dist.all_reduce(flat.grad))


def _seconds(call: Any) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


if __name__ == "__main__":
    main()
