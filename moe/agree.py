"""The one exchange of counts of a step: what every rank sends to every expert, and whether the ranks agree at all.

It comes before any row moves: a receive of another size than was sent is silent or ends the process, and a rank that
cannot go on must say so before the others wait for its rows.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moe.errors import ContractError, MoeConfigError, PlanError
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
    """Tokens, experts and weights are not of one length, or not in the order that `per_token` promises."""
    NO_ROUTING = 6
    EXPERTS = 7
    """The gate and the ranks have not as many experts."""
    MISFIT = 8
    """The routing is for another number of tokens."""
    DTYPE = 9
    RAISED = 10
    COMPLEX = 11


_SAYS = {
    Problem.NOT_FINITE: "its gate returned weights that are NaN or infinite; look at the router's input and weights",
    Problem.OUT_OF_RANGE: "its gate returned experts or tokens that do not exist",
    Problem.REPEATED: "its gate sent a token to the same expert twice; the ids of a token must differ",
    Problem.UNEQUAL: "its gate returned tokens, experts and weights that do not belong together",
    Problem.NO_ROUTING: "its gate returned neither Assignments nor Slots; make them with moe.records.top_k_assignments",
    Problem.EXPERTS: "its gate has not as many experts as the ranks of ep hold together, num_experts of each",
    Problem.MISFIT: "its gate returned a routing for another number of tokens than it was asked for",
    Problem.TOKENS: "its order returned rows or counts that do not belong together",
    Problem.DTYPE: "its rows are of a dtype that does not travel; use fp32, fp64, bf16 or fp16",
    Problem.COMPLEX: "its gate returned weights that are complex; use real numbers",
    Problem.RAISED: "its gate or order raised an error, which that rank shows",
}


def problem_of(routing: Routing) -> Problem:
    """Return what is wrong with what a gate decided."""
    if not isinstance(routing, (Assignments, Slots)):
        return Problem.NO_ROUTING
    if not isinstance(routing, Assignments):
        if routing.dispatch_BTES.is_complex() or routing.combine_BTES.is_complex():
            return Problem.COMPLEX
        if not (routing.dispatch_BTES.dim() == 4 and routing.dispatch_BTES.shape == routing.combine_BTES.shape):
            return Problem.UNEQUAL
        finite = routing.dispatch_BTES.isfinite().all() & routing.combine_BTES.isfinite().all()
        return Problem.NONE if bool(finite) else Problem.NOT_FINITE
    if not _is_whole(routing):
        return Problem.UNEQUAL
    if _has_fractions(routing.experts_A) or _has_fractions(routing.tokens_A):
        return Problem.OUT_OF_RANGE
    if routing.weights_A.is_complex():
        return Problem.COMPLEX
    # On the host, which has to know: on a device it would be waited for with every question.
    experts, tokens = _host(routing.experts_A), _host(routing.tokens_A)
    if not np.isfinite(_host(routing.weights_A, torch.float64)).all():
        return Problem.NOT_FINITE
    if _outside(experts, routing.num_experts) or _outside(tokens, routing.num_tokens):
        return Problem.OUT_OF_RANGE
    if (per_token := routing.per_token) is not None:
        of_token_TK = tokens.reshape(routing.num_tokens, per_token)
        if (of_token_TK != np.arange(routing.num_tokens)[:, None]).any():
            return Problem.UNEQUAL
    pairs = np.sort(tokens * routing.num_experts + experts)
    return Problem.REPEATED if (pairs[1:] == pairs[:-1]).any() else Problem.NONE


def describe(problem: Problem) -> str:
    """Return a problem in words."""
    return _SAYS[problem]


def misfit_of(routing: Routing, num_tokens: int, num_experts: int) -> Problem:
    """Return whether a routing is for other tokens or experts than these."""
    if isinstance(routing, Assignments):
        tokens, experts = routing.num_tokens, routing.num_experts
    else:
        sequences, each, experts, _ = routing.dispatch_BTES.shape
        tokens = sequences * each
    if experts != num_experts:
        return Problem.EXPERTS
    return Problem.NONE if tokens == num_tokens else Problem.MISFIT


def _is_whole(routing: Assignments) -> bool:
    shape, keep, per_token = routing.experts_A.shape, routing.keep_A, routing.per_token
    if len(shape) != 1 or not shape == routing.tokens_A.shape == routing.weights_A.shape:
        return False
    if keep is not None and (keep.shape != shape or keep.dtype != torch.bool):
        return False
    return per_token is None or per_token * routing.num_tokens == shape[0]


def _has_fractions(ids: Tensor) -> bool:
    return ids.is_floating_point() or ids.is_complex()


def _host(values: Tensor, dtype: torch.dtype = torch.int64) -> NDArray[Any]:
    return values.detach().to("cpu", dtype).numpy()


def _outside(ids: Ints, size: int) -> bool:
    return bool(len(ids)) and int(ids.view(np.uint64).max()) >= size  # where those below zero are the largest


def agree_on_experts(num_experts: int, lanes: Lanes, layer: str) -> None:
    """Raise MoeConfigError on every rank where the ranks have another number of experts. Every rank of both axes calls.

    Counts have one entry an expert, so this must be alike before they are exchanged.
    """
    sizes = np.array([num_experts])
    for lane, group in ((lanes.inter, lanes.ep), (lanes.intra, lanes.esp)):
        if group is not None:
            sizes = lane.call(partial(_gather, sizes, group), layer=layer, op="exchange of sizes")
    if int(sizes.min()) != int(sizes.max()):
        raise MoeConfigError(
            f"layer {layer or '?'}: the ranks have {sizes.tolist()} experts; give each the same number, and a gate "
            "for all of them together"
        )


def agree(
    counts_E: Tensor, width: int, dtype: torch.dtype, problem: Problem, plan: LayerPlan, lanes: Lanes, layer: str
) -> Traffic:
    """Return the traffic of this step. Every rank of both axes calls, also one with a problem.

    Raises ContractError on every rank where the routing of any rank has a problem, PlanError where the ranks differ in
    plan, width or dtype, ExchangeError when a rank does not come.
    """
    header = _header(width, dtype, problem, plan, layer)
    own = every = np.concatenate([np.array(header, np.int64), _host(counts_E)])
    if lanes.ep is not None:
        every = lanes.inter.call(partial(_gather, own, lanes.ep), layer=layer, op="exchange of counts")
    if lanes.esp is not None:
        every = lanes.intra.call(partial(_gather, every, lanes.esp), layer=layer, op="exchange of counts")
    every = every.reshape(lanes.num_members, lanes.num_ranks, -1)
    _check(every[..., : len(header)], lanes, layer)
    return Traffic(every[..., len(header) :], lanes.member, lanes.position)


def _header(width: int, dtype: torch.dtype, problem: Problem, plan: LayerPlan, layer: str) -> list[int]:
    order = _ORDERS.index(plan.order)
    sizes = [plan.forward_chunks, plan.backward_chunks, order, plan.forward_lag, plan.backward_lag, plan.gradient_bytes]
    if dtype not in _DTYPES:
        return [int(problem or Problem.DTYPE), 0, width, 0, *sizes]
    return [int(problem), crc32(layer.encode()), width, _DTYPES.index(dtype), *sizes]


def _gather(part: Ints, group: dist.ProcessGroup | None) -> Ints:
    assert group is not None
    copies = torch.from_numpy(np.tile(part, group.size()))
    whole = torch.empty_like(copies)
    # Not an all-gather, of which gloo lets two of other sizes meet where ranks make different calls, a layer here and a
    # save there: one gets nonsense, the other's process ends. Nothing else on these groups is an all-to-all of gloo's.
    dist.all_to_all_single(whole, copies, group=group)
    return whole.numpy()


def _check(headers: Ints, lanes: Lanes, layer: str) -> None:
    for member, position in np.ndindex(*headers.shape[:2]):
        problem = Problem(int(headers[member, position, 0]))
        if problem:
            raise ContractError(f"layer {layer or '?'}, {_place(member, position, lanes)}: {_SAYS[problem]}")
    for member, position in np.ndindex(*headers.shape[:2]):
        (name, *first), (other_name, *other) = (headers[at][1:].tolist() for at in ((0, 0), (member, position)))
        if name != other_name:
            raise PlanError(
                f"{_place(member, position, lanes)} is in another layer than {_place(0, 0, lanes)}; one of them is "
                f"layer {layer or '?'}. Ranks run the same layers in the same order, also one without tokens"
            )
        if first != other:
            names = "width, dtype, forward_chunks, backward_chunks, order, forward_lag, backward_lag, gradient_bytes"
            raise PlanError(
                f"layer {layer or '?'}: {_place(0, 0, lanes)} has ({names}) = {first}, "
                f"{_place(member, position, lanes)} has {other}; give every rank the same plan and dtype"
            )


def _place(member: int, position: int, lanes: Lanes) -> str:
    """Name a rank by its places on the axes, which is what all ranks of a layer know alike."""
    return f"rank {position} of the ep axis" + (f", {member} of the esp axis" if lanes.num_members > 1 else "")
