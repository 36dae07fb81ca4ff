"""The one exchange of counts of a step: what every rank sends to every expert, and whether the ranks agree at all.

It comes before any row moves: a receive of another size than was sent is silent or ends the process, and a rank that
cannot go on must say so before the others wait for its rows.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import ContractError, PlanError
from moe.lanes import Lanes
from moe.plan import LayerPlan
from moe.records import Assignments, Routing, Slots
from moe.traffic import Ints, Traffic

_ORDERS = ("fifo", "ready")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(IntEnum):
    """What can be wrong with the routing of one rank."""

    NONE = 0
    NOT_FINITE = 1
    OUT_OF_RANGE = 2
    REPEATED = 3
    TOKENS = 4
    """The rows of the order do not fit the experts."""
    UNEQUAL = 5
    NO_ROUTING = 6
    EXPERTS = 7
    """The gate and the ranks have not as many experts."""


_SAYS = {
    Problem.NOT_FINITE: "its gate returned weights that are NaN or infinite; look at the router's input and weights",
    Problem.OUT_OF_RANGE: "its gate returned experts or tokens that do not exist",
    Problem.REPEATED: "its gate sent a token to the same expert twice; the ids of a token must differ",
    Problem.UNEQUAL: "its gate returned tokens, experts and weights that are not of one length",
    Problem.NO_ROUTING: "its gate returned neither Assignments nor Slots; make them with moe.records.top_k_assignments",
    Problem.EXPERTS: "its gate has not as many experts as the ranks of ep hold together, num_experts of each",
    Problem.TOKENS: "its order returned rows or counts that do not belong together",
}


def problem_of(routing: Routing) -> Problem:
    """Return what is wrong with what a gate decided."""
    if not isinstance(routing, (Assignments, Slots)):
        return Problem.NO_ROUTING
    if not isinstance(routing, Assignments):
        finite = routing.dispatch_BTES.isfinite().all() & routing.combine_BTES.isfinite().all()
        return Problem.NONE if bool(finite) else Problem.NOT_FINITE
    experts, tokens = routing.experts_A, routing.tokens_A
    if not len(experts) == len(tokens) == len(routing.weights_A):
        return Problem.UNEQUAL
    if not bool(routing.weights_A.isfinite().all()):
        return Problem.NOT_FINITE
    if _outside(experts, routing.num_experts) or _outside(tokens, routing.num_tokens):
        return Problem.OUT_OF_RANGE
    pairs = (tokens * routing.num_experts + experts).sort().values
    return Problem.REPEATED if bool((pairs[1:] == pairs[:-1]).any()) else Problem.NONE


def describe(problem: Problem) -> str:
    """Return a problem in words."""
    return _SAYS[problem]


def _outside(ids: Tensor, size: int) -> bool:
    return bool(((ids < 0) | (ids >= size)).any())


def agree(
    counts_E: Tensor, width: int, dtype: torch.dtype, problem: Problem, plan: LayerPlan, lanes: Lanes, layer: str
) -> Traffic:
    """Return the traffic of this step. Every rank of both axes calls, also one with a problem.

    Raises ContractError on every rank where the routing of any rank has a problem, PlanError where the ranks differ in
    plan, width or dtype, ExchangeError when a rank does not come.
    """
    own = torch.cat([torch.tensor(_header(width, dtype, problem, plan)), counts_E.to("cpu", torch.int64)])
    every = own.view(1, 1, -1)
    if lanes.ep is not None:
        every = lanes.inter.submit(lambda: _gather(own, lanes.ep), layer=layer, op="exchange of counts").result()
        every = every.view(1, lanes.num_ranks, -1)
    if lanes.esp is not None:
        part = every
        every = lanes.intra.submit(lambda: _gather(part, lanes.esp), layer=layer, op="exchange of counts").result()
        every = every.view(lanes.num_members, lanes.num_ranks, -1)
    size = len(own) - len(counts_E)
    _check(every[..., :size].numpy(), lanes, layer)
    return Traffic(every[..., size:].numpy(), lanes.member, lanes.position)


def _header(width: int, dtype: torch.dtype, problem: Problem, plan: LayerPlan) -> list[int]:
    order = _ORDERS.index(plan.order)
    sizes = [plan.forward_chunks, plan.backward_chunks, order, plan.forward_lag, plan.backward_lag, plan.gradient_bytes]
    return [int(problem), width, _DTYPES.index(dtype), *sizes]


def _gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    assert group is not None
    whole = part.new_empty(group.size() * part.numel())
    dist.all_gather_single(whole, part.reshape(-1), group=group)
    return whole


def _check(headers: Ints, lanes: Lanes, layer: str) -> None:
    for member, position in np.ndindex(*headers.shape[:2]):
        problem = Problem(int(headers[member, position, 0]))
        if problem:
            raise ContractError(f"layer {layer or '?'}, {_place(member, position, lanes)}: {_SAYS[problem]}")
    for member, position in np.ndindex(*headers.shape[:2]):
        first, other = headers[0, 0, 1:], headers[member, position, 1:]
        if not np.array_equal(first, other):
            names = "width, dtype, forward_chunks, backward_chunks, order, forward_lag, backward_lag, gradient_bytes"
            raise PlanError(
                f"layer {layer or '?'}: {_place(0, 0, lanes)} has ({names}) = {first.tolist()}, "
                f"{_place(member, position, lanes)} has {other.tolist()}; give every rank the same plan and dtype"
            )


def _place(member: int, position: int, lanes: Lanes) -> str:
    """Name a rank by its places on the axes, which is what all ranks of a layer know alike."""
    return f"rank {position} of the ep axis" + (f", {member} of the esp axis" if lanes.num_members > 1 else "")
