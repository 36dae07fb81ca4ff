"""What `python -m moe profile` measures under torchrun: the links between these ranks, and real experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe.calibrate import measure_layer, with_overheads
from moe.cost import LayerLoad, Profile
from moe.dispatch import DirectExchange
from moe.errors import MoeConfigError
from moe.experts import StackedExperts
from moe.issue import IssueQueue, naming, own_group
from moe.lanes import Lanes, NoLink
from moe.profiler import Links, ProfileConfig, make_profile

_DEADLINE_S = 300.0
"""No rank is so much later than the others in anything that is measured, unless it is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """The experts of one rank."""

    width: int
    inner: int
    count: int
    dtype: torch.dtype = torch.float32
    """Of products and of rows that travel."""

    def __post_init__(self) -> None:
        for name in ("width", "inner", "count"):
            if getattr(self, name) < 1:
                raise MoeConfigError(f"experts have {name} {getattr(self, name)}; it must be at least 1")


def profile_here(config: ProfileConfig, *, esp: int, experts: ExpertShape) -> tuple[int, Profile]:
    """Join the world that torchrun describes, profile it, leave; return this process's rank and the profile.

    Ranks `esp * i .. esp * i + esp - 1` are taken to be on one host. Raises MoeConfigError outside torchrun,
    ExchangeError where a rank is lost or late.
    """
    if not dist.is_torchelastic_launched():
        raise MoeConfigError(
            "a profile is measured by the ranks that will train; run "
            "`torchrun --nproc-per-node 4 -m moe profile --esp 2 --out profile.json`"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=_DEADLINE_S))
    try:
        with naming("profile"):
            return dist.get_rank(), profile_world(config, esp=esp, experts=experts)
    finally:
        dist.destroy_process_group()


def profile_world(config: ProfileConfig, *, esp: int, experts: ExpertShape) -> Profile:
    """Profile the default group's ranks; all of them call."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if esp < 1 or size % esp or size // esp < 2:
        raise MoeConfigError(
            f"{size} ranks do not make hosts of {esp}, two at least; --esp is a divisor of the ranks, and smaller"
        )
    across = _mine([list(range(i, size, esp)) for i in range(esp)], rank)
    within = _mine([list(range(i, i + esp)) for i in range(0, size, esp)], rank) if esp > 1 else None
    inter_group, intra_group = own_group(across), own_group(within) if within else None
    with IssueQueue(inter_group, "inter") as inter, IssueQueue(intra_group, "intra") as intra:
        links = Links(
            inter=inter,
            ep=inter_group,
            intra=intra if intra_group else None,
            esp=intra_group,
            gradients=own_group(across),
        )
        forward, backward = expert_jobs(experts)
        profile = make_profile(links, expert_forward=forward, expert_backward=backward, config=config)
        members = 1 if intra_group is None else esp
        lanes = Lanes(
            inter=inter,
            intra=intra if intra_group else NoLink(),
            ep=inter_group,
            esp=intra_group,
            exchange=DirectExchange(inter_group),
            timeout_s=inter.timeout_s,
            rank=rank,
        )
        rows = max(experts.count * size // esp, config.most_rows // (2 * members))
        nbytes = 4.0 * rows * experts.width
        gathered = members * nbytes if members > 1 else 0.0
        load = LayerLoad(exchange_bytes=nbytes, gather_bytes=gathered, expert_rows=rows * members)
        module = made_experts(experts)
        took = measure_layer(module, lanes, rows=rows, width=experts.width, like=module.down_proj)
        return with_overheads(profile, load, *took)


def made_experts(shape: ExpertShape) -> StackedExperts:
    """Return random experts of a shape."""
    return StackedExperts(
        (torch.randn(shape.count, 2 * shape.inner, shape.width) * 0.02).to(shape.dtype),
        (torch.randn(shape.count, shape.width, shape.inner) * 0.02).to(shape.dtype),
    )


def expert_jobs(shape: ExpertShape) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """Return jobs that run the experts forward, and backward alone, on a number of rows."""
    module = made_experts(shape)

    def inputs(rows: int) -> tuple[torch.Tensor, list[int]]:
        each = [rows // shape.count] * shape.count
        each[0] += rows - sum(each)
        return torch.randn(rows, shape.width, dtype=shape.dtype, requires_grad=True), each

    def forward(rows: int) -> Callable[[], Any]:
        x, counts = inputs(rows)
        return lambda: module(x, counts)

    def backward(rows: int) -> Callable[[], Any]:
        x, counts = inputs(rows)
        y, wanted = module(x, counts), [x, *module.parameters()]
        grad = torch.ones_like(y)
        return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)

    return forward, backward


def _mine(sets: list[list[int]], rank: int) -> dist.ProcessGroup:
    groups = [dist.new_group(ranks) for ranks in sets]
    mine = groups[next(i for i, ranks in enumerate(sets) if rank in ranks)]
    assert isinstance(mine, dist.ProcessGroup)
    return mine
