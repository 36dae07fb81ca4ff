"""Run a stack of MoE layers forward and backward on this rank, through the layer's own autograd function, and time it.

Links and exchanges are real; the experts are waits of a given length, so that four ranks on two cores do not compete.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.moe_layers import ROW_BYTES, BenchLayer
from moe.dispatch import DirectExchange
from moe.hooks import Hooks
from moe.issue import IssueQueue, Span, Ticket, own_group
from moe.lanes import Lanes
from moe.overlap import LayerRun, run_experts
from moe.plan import LayerPlan
from moe.traffic import Traffic

EXPERTS = 4
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class World:
    """The groups and queues of one rank; hosts hold ranks 0, 1 and 2, 3."""

    lanes: Lanes
    gradients: dist.ProcessGroup
    spans: list[Span]

    @property
    def ep(self) -> dist.ProcessGroup:
        """The group across the hosts."""
        assert self.lanes.ep is not None
        return self.lanes.ep

    @property
    def inter(self) -> IssueQueue:
        """The queue of the link between the hosts."""
        assert isinstance(self.lanes.inter, IssueQueue)
        return self.lanes.inter

    @property
    def intra(self) -> IssueQueue:
        """The queue of the link within a host."""
        assert isinstance(self.lanes.intra, IssueQueue)
        return self.lanes.intra


def make_world() -> World:
    """Build the groups of four ranks: `ep` across the hosts, `esp` within one, gradients across."""
    rank = dist.get_rank()
    made = {}
    for name, sets in (("ep", [[0, 2], [1, 3]]), ("esp", [[0, 1], [2, 3]])):
        groups = [dist.new_group(ranks) for ranks in sets]
        made[name] = groups[next(i for i, ranks in enumerate(sets) if rank in ranks)]
    ep, esp, gradients = (own_group(made[name], timeout_s=TIMEOUT_S) for name in ("ep", "esp", "ep"))
    spans: list[Span] = []
    lanes = Lanes(
        inter=IssueQueue(ep, "inter", timeout_s=TIMEOUT_S, on_span=spans.append),
        intra=IssueQueue(esp, "intra", timeout_s=TIMEOUT_S, on_span=spans.append),
        ep=ep,
        esp=esp,
        exchange=DirectExchange(ep),
        timeout_s=TIMEOUT_S,
        rank=rank,
        on_span=spans.append,
    )
    return World(lanes, gradients, spans)


class WaitingExperts(nn.Module):
    """Experts whose computation is a wait: `row_s` seconds a row in forward, twice that in backward."""

    def __init__(self, row_s: float) -> None:
        super().__init__()
        self.row_s = row_s
        self.num_experts = EXPERTS // 2

    def forward(self, rows_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return the rows as they came, later."""
        out = _Wait.apply(rows_ND, self)
        assert isinstance(out, torch.Tensor)
        return out

    def wait(self, rows: int, factor: int) -> None:
        """Sleep as long as that many rows take."""
        time.sleep(rows * self.row_s * factor)


def waiting_experts(layer: BenchLayer, expert_s: float) -> WaitingExperts:
    """Return experts that take `expert_s` in forward for all rows of a layer, of both ranks of a host."""
    return WaitingExperts(expert_s / (2 * layer.rows))


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, experts: WaitingExperts) -> torch.Tensor:
        ctx.experts = experts
        experts.wait(len(rows_ND), 1)
        return rows_ND.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.experts.wait(len(grads[0]), 2)
        return grads[0], None


class Stack:
    """Layers with their plans, and the gradients that are there to be sent: `ready[l]` bytes before layer l's backward.

    Layers are in backward order, as plans are; `ready` has one entry more, for what comes after the last.
    """

    def __init__(
        self, world: World, layers: Sequence[BenchLayer], expert_s: Sequence[float], ready: Sequence[int]
    ) -> None:
        self.world, self.layers, self.expert_s, self.ready = world, layers, expert_s, ready
        self.slice_bytes = layers[0].slice_bytes
        self._sent: list[Ticket] = []
        self._left = 0

    def step(self, plans: Sequence[LayerPlan]) -> float:
        """Run forward, backward and flush once; return the seconds of the slowest rank."""
        x = torch.zeros(self.layers[-1].rows, ROW_BYTES // 4, requires_grad=True)
        dist.barrier()
        self.world.spans.clear()
        self._sent, self._left = [], sum(self.ready)
        began = time.perf_counter()
        for i in reversed(range(len(self.layers))):
            x = run_experts(x, self._run(i, plans[i]))
        x.backward(torch.zeros_like(x))
        self._send(self._left, "flush")
        for ticket in self._sent:
            ticket.result()
        took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item()

    def _run(self, i: int, plan: LayerPlan) -> LayerRun:
        layer, lanes, name = self.layers[i], self.world.lanes, str(i)
        rows_SPE = np.full((2, 2, EXPERTS), layer.rows // EXPERTS, dtype=np.int64)
        experts = waiting_experts(layer, self.expert_s[i])
        traffic = Traffic(rows_SPE, lanes.member, lanes.position)
        return LayerRun(experts, traffic, plan, lanes, Hooks(), name, lambda layer, p: self._drain(layer, p))

    def _drain(self, layer: str, plan: LayerPlan) -> int:
        left = self._left
        self._send(plan.gradient_bytes, layer)
        return left - self._left

    def _send(self, nbytes: int, layer: str) -> None:
        while nbytes > 0 and self._left > 0:
            size = min(self.slice_bytes, nbytes, self._left)
            values = torch.zeros(size // 4)
            job = lambda values=values: dist.all_reduce(values, group=self.world.gradients)  # noqa: E731
            self._sent.append(self.world.inter.submit(job, layer=layer, op="gradient"))
            nbytes, self._left = nbytes - size, self._left - size


def without_gradients(plan: LayerPlan) -> LayerPlan:
    """Return the plan as a peer runs it: gradients afterwards."""
    return replace(plan, gradient_bytes=0)
