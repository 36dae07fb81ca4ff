"""What the executor itself costs, found by running it: its Python and its copies are no part of links and experts.

Without it plans have too many chunks: each looks free once links and experts are busy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe.cost import Cost, LayerLoad, Line, Profile
from moe.fit import nonnegative
from moe.flow import Experts, LayerRun
from moe.hooks import Hooks
from moe.issue import Span
from moe.lanes import Lanes
from moe.overlap import run_experts
from moe.plan import COMPUTE, LayerPlan
from moe.planner import direction_time
from moe.traffic import Traffic

CHUNKS = (1, 2, 4, 8)
"""What is run; as many forward as backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """What one direction took, by chunks, as many forward as backward; seconds of the slowest rank, no gradients."""

    layer_s: Mapping[int, float]
    """From its start to its end."""
    computing_s: Mapping[int, float]
    """Of all chunks together, between what they needed and what they handed on."""


def with_overheads(profile: Profile, load: LayerLoad, forward: LayerTimes, backward: LayerTimes) -> Profile:
    """Return the profile with what the executor adds to each piece of the experts' work, and to a layer. Pure.

    Of a piece: least squares over alpha for each and beta for its bytes, neither below zero. Of a layer: what is then
    missing in the median.
    """
    bare = replace(load, gradient_bytes=0)
    trial = replace(
        profile,
        piece_forward=_piece(profile.expert_forward, bare, forward),
        piece_backward=_piece(profile.expert_backward, bare, backward),
        layer_s=0.0,
    )
    missing = [
        seconds - direction_time(trial, bare, r, backward=b)
        for b, times in ((False, forward), (True, backward))
        for r, seconds in times.layer_s.items()
    ]
    return replace(trial, layer_s=max(0.0, median(missing)))


def _piece(expert: Cost, load: LayerLoad, times: LayerTimes) -> Line:
    chunks = np.array(list(times.computing_s), dtype=float)
    extra = np.array([seconds - r * expert(load.expert_rows / r) for r, seconds in times.computing_s.items()])
    alpha, all_bytes = nonnegative(chunks, np.ones_like(chunks), extra)
    return Line(alpha, all_bytes / load.held_bytes if load.held_bytes else 0.0)  # no row may have left its rank


def measure_layer(
    experts: Experts,
    lanes: Lanes,
    *,
    rows: int,
    width: int,
    like: Tensor,
    chunks: Sequence[int] = CHUNKS,
    tries: int = 5,
) -> tuple[LayerTimes, LayerTimes]:
    """Run a layer, and return what forward and backward took; every rank of the default group calls.

    Each rank sends `rows` rows `[width]` of the dtype and device of `like`, evenly to all experts. The median of the
    slowest rank of each try counts.
    """
    spans: list[Span] = []
    lanes = replace(lanes, on_span=spans.append)
    num_experts = experts.num_experts * lanes.num_ranks
    rows_SPE = np.full((lanes.num_members, lanes.num_ranks, num_experts), max(1, rows // num_experts), dtype=np.int64)
    traffic = Traffic(rows_SPE, lanes.member, lanes.position)
    x_RD = like.new_zeros(int(rows_SPE[0, 0].sum()), width)
    found: dict[int, list[list[float]]] = {r: [] for r in chunks}
    for i in range(tries + 1):  # the first warms up
        for r in chunks:
            run = LayerRun(experts, traffic, LayerPlan(r, r), lanes, Hooks(), "calibration")
            dist.barrier()
            spans.clear()
            marks = [time.perf_counter()]
            y_RD = run_experts(x_RD.clone().requires_grad_(), run)
            marks.append(time.perf_counter())
            y_RD.backward(torch.ones_like(x_RD))
            marks.append(time.perf_counter())
            took = [*np.diff(marks), *(_computing(spans, backward=b) for b in (False, True))]
            slowest = torch.tensor(took, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if i:
                found[r].append(slowest.tolist())
    middle = {r: [median(values) for values in zip(*times, strict=True)] for r, times in found.items()}
    forward, backward = (
        LayerTimes(layer_s={r: m[b] for r, m in middle.items()}, computing_s={r: m[2 + b] for r, m in middle.items()})
        for b in (0, 1)
    )
    return forward, backward


def _computing(spans: Sequence[Span], *, backward: bool) -> float:
    own = [s for s in spans if s.link == COMPUTE and s.op.startswith("backward") == backward]
    return sum(s.t1_ns - s.t0_ns for s in own) * 1e-9
