"""What the executor itself costs, found by running it: a chunk's Python and copies are no part of links and experts.

Without it plans have too many chunks: each looks free once links and experts are busy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from moe.cost import LayerLoad, Profile
from moe.flow import Experts, LayerRun
from moe.hooks import Hooks
from moe.lanes import Lanes
from moe.overlap import run_experts
from moe.plan import LayerPlan
from moe.planner import direction_time
from moe.traffic import Traffic

CHUNKS = (1, 2, 4, 8, 12)
"""What is run; as many forward as backward."""
_STEPS = 100
"""Values of chunk_s that are tried."""


def with_overheads(profile: Profile, load: LayerLoad, measured_s: Mapping[int, float]) -> Profile:
    """Return the profile with the `chunk_s` and `layer_s` that explain best what a layer took. Pure.

    `measured_s[r]` are seconds of forward and backward with r chunks each way and no gradients. Least squares of the
    relative errors, over `chunk_s` by trying, `layer_s` being what is then missing in the median.
    """
    bare = replace(load, gradient_bytes=0)
    most = max(s / r for r, s in measured_s.items())

    def missing(chunk_s: float) -> dict[int, float]:
        trial = replace(profile, chunk_s=chunk_s, layer_s=0.0)
        told = {r: sum(direction_time(trial, bare, r, backward=b) for b in (False, True)) for r in measured_s}
        return {r: measured_s[r] - told[r] for r in measured_s}

    best, least = (0.0, 0.0), float("inf")
    for chunk_s in np.linspace(0.0, most / 4, _STEPS).tolist():
        gaps = missing(chunk_s)
        layer_s = max(0.0, median(gaps.values()) / 2)
        error = sum(((gap - 2 * layer_s) / measured_s[r]) ** 2 for r, gap in gaps.items())
        if error < least:
            best, least = (chunk_s, layer_s), error
    return replace(profile, chunk_s=best[0], layer_s=best[1])


def layer_seconds(
    experts: Experts, lanes: Lanes, *, rows: int, width: int, chunks: Sequence[int] = CHUNKS, tries: int = 5
) -> dict[int, float]:
    """Return the seconds of forward and backward of a layer, by chunks; every rank of the default group calls.

    Each rank sends `rows` rows `[width]`, evenly to all experts. The median of the slowest rank of each try counts.
    """
    num_experts = experts.num_experts * lanes.num_ranks
    rows_SPE = np.full((lanes.num_members, lanes.num_ranks, num_experts), max(1, rows // num_experts), dtype=np.int64)
    traffic = Traffic(rows_SPE, lanes.member, lanes.position)
    like = next(iter(experts.parameters()))
    x_RD = like.new_zeros(int(rows_SPE[0, 0].sum()), width)
    found: dict[int, list[float]] = {r: [] for r in chunks}
    for i in range(tries + 1):  # the first warms up
        for r in chunks:
            run = LayerRun(experts, traffic, LayerPlan(r, r), lanes, Hooks(), "calibration")
            dist.barrier()
            began = time.perf_counter()
            run_experts(x_RD.clone().requires_grad_(), run).backward(torch.ones_like(x_RD))
            took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if i:
                found[r].append(took.item())
    return {r: median(times) for r, times in found.items()}
