"""What each sub-module promises, as checks to run on one of your own. One rank is enough; T tokens, any dtype.

`check_gate`, `check_order`, `check_experts` and `check_hooks` return nothing and raise ContractError, which says what
was promised and what was seen. `check_exchange`, for dispatch and combine, runs on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.agree import describe, problem_of
from moe.dispatch import Exchange
from moe.errors import ContractError
from moe.hooks import Hooks
from moe.order import Order
from moe.records import Assignments, ChunkInfo, Routing

_CLOSE = 1e-4


def check_gate(gate: Callable[[Tensor], Routing], x_TD: Tensor, *, causal: bool = True) -> None:
    """Check shapes, finite weights, distinct experts, repeatability, and that the scores carry a gradient.

    `causal=True` also checks that a token's routing does not depend on the other tokens: permuted tokens give permuted
    routing. Expert choice, SoftMoE and capacities do not promise that.
    """
    routing = gate(x_TD)
    problem = problem_of(routing)
    _require(not problem, f"a gate's routing is well formed; {describe(problem) if problem else ''}")
    weights = routing.weights_A if isinstance(routing, Assignments) else routing.combine_BTES
    again = gate(x_TD)
    same = again.weights_A if isinstance(again, Assignments) else again.combine_BTES
    _require(torch.equal(weights, same), "a gate returns the same for the same tokens, or recomputing it goes astray")
    _check_scores(gate, weights)
    if isinstance(routing, Assignments):
        _check_assignments(routing, len(x_TD))
        if causal:
            _check_permutation(gate, x_TD, routing)


def check_order(order: Order, gate: Callable[[Tensor], Routing], x_TD: Tensor) -> None:
    """Check that counts and rows belong together, and that with experts that do nothing every token gets itself back.

    That is, multiplied by the sum of its weights: mass is neither lost nor made. Gradients are checked with it.
    """
    x_TD = x_TD.detach().requires_grad_()
    routing = gate(x_TD.detach())
    ordered = order(x_TD, routing)
    rows, total = len(ordered.rows_RD), int(ordered.counts_E.sum())
    _require(rows == total, f"an order's counts add up to its rows; got {total} for {rows} rows")
    y_TD = ordered.inverse(ordered.rows_RD)
    _require(y_TD.shape == x_TD.shape, f"the inverse order returns {tuple(x_TD.shape)}; got {tuple(y_TD.shape)}")
    _require(y_TD.dtype == x_TD.dtype, f"the inverse order returns {x_TD.dtype}; got {y_TD.dtype}")
    mixing_TT = _mixing(routing, len(x_TD)).to(x_TD.dtype)
    _require_close(y_TD, mixing_TT @ x_TD, "experts that do nothing give every token back, times its weights")
    (grad,) = torch.autograd.grad(y_TD.sum(), x_TD)
    expected = mixing_TT.sum(0).unsqueeze(1).expand_as(grad)
    _require_close(grad, expected, "the gradient of a token is the sum of its weights")


def check_experts(experts: nn.Module, rows_ND: Tensor) -> None:
    """Check shape and dtype, that an expert sees its own rows only, and that an expert may have none."""
    num = getattr(experts, "num_experts", None)
    _require(isinstance(num, int) and num > 0, "experts have an int `num_experts`: how many are on this rank")
    assert isinstance(num, int)
    counts = [len(rows_ND) // num] * num
    counts[0] += len(rows_ND) - sum(counts)
    out_ND = experts(rows_ND, counts)
    _require(out_ND.shape == rows_ND.shape, f"experts return {tuple(rows_ND.shape)}; got {tuple(out_ND.shape)}")
    _require(out_ND.dtype == rows_ND.dtype, f"experts return {rows_ND.dtype}; got {out_ND.dtype}")
    for e, (rows, out) in enumerate(zip(rows_ND.split(counts), out_ND.split(counts), strict=True)):
        alone = experts(rows, [len(rows) if i == e else 0 for i in range(num)])
        _require_close(out, alone, f"expert {e} returns the same whatever rows the other experts have")


def check_hooks(hooks: Hooks, rows_ND: Tensor, *, tolerance: float = 0.0) -> None:
    """Check that what is done to a chunk before it is moved is undone after; `tolerance` for lossy compression."""
    for backward in (False, True):
        info = ChunkInfo("check", 0, 1, backward)
        for name, pair in (
            ("dispatch", (hooks.before_dispatch, hooks.after_dispatch)),
            ("combine", (hooks.before_combine, hooks.after_combine)),
        ):
            sent = pair[0](rows_ND, info)
            _require(
                len(sent) == len(rows_ND), f"before_{name} keeps the number of rows {len(rows_ND)}; got {len(sent)}"
            )
            back = pair[1](sent, info)
            same = back.shape == rows_ND.shape and back.dtype == rows_ND.dtype
            _require(same, f"after_{name} returns {tuple(rows_ND.shape)} {rows_ND.dtype}; got {tuple(back.shape)}")
            error = float((back - rows_ND).abs().max()) if len(back) else 0.0
            _require(error <= tolerance, f"after_{name} undoes before_{name} within {tolerance:g}; got {error:.3g}")


def check_exchange(exchange: Exchange, group: dist.ProcessGroup, *, tries: int = 3, seed: int = 0) -> None:
    """Check that rows arrive whole, by source, also where ranks send nothing, and that combine brings them back.

    Every rank of `group`, the `ep` axis, calls, and every rank gets the same error.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = np.random.default_rng(seed)
    for most in range(tries):
        matrix_PP = generator.integers(0, most + 1, (size, size))
        pairs = list(np.ndindex(size, size))
        rows = {(s, d): torch.arange(2.0 * int(matrix_PP[s, d])).view(-1, 2) + 1000 * s + 100 * d for s, d in pairs}
        sent = torch.cat([rows[rank, d] for d in range(size)])
        arrived = torch.cat([rows[s, rank] for s in range(size)])
        promise = "dispatch returns the rows that were sent, in order of their source"
        _require_everywhere(torch.equal(exchange(sent, matrix_PP), arrived), promise, group)
        promise = "combine, which gets the matrix transposed, brings the rows back"
        _require_everywhere(torch.equal(exchange(arrived, matrix_PP.T), sent), promise, group)


def _require_everywhere(holds: bool, promise: str, group: dist.ProcessGroup) -> None:
    every: list[bool] = [True] * dist.get_world_size(group)
    dist.all_gather_object(every, holds, group=group)
    wrong = [rank for rank, held in enumerate(every) if not held]
    _require(not wrong, f"{promise}; not on ranks {wrong} of the ep axis")


def _check_scores(gate: Callable[[Tensor], Routing], weights: Tensor) -> None:
    params = [p for p in gate.parameters() if p.requires_grad] if isinstance(gate, nn.Module) else []
    if not params:
        return
    _require(weights.requires_grad, "the weights carry a gradient to the gate's parameters; they are detached")
    scale = torch.linspace(0.5, 1.5, weights.numel(), device=weights.device, dtype=weights.dtype).view_as(weights)
    grads = torch.autograd.grad((weights * scale).sum(), params, allow_unused=True)
    reached = any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)
    _require(reached, "the weights carry a gradient to the gate's parameters; all of it is zero")


def _check_assignments(routing: Assignments, num_tokens: int) -> None:
    _require(routing.num_tokens == num_tokens, f"num_tokens is that of x, {num_tokens}; got {routing.num_tokens}")


def _check_permutation(gate: Callable[[Tensor], Routing], x_TD: Tensor, routing: Assignments) -> None:
    turned = torch.arange(len(x_TD) - 1, -1, -1, device=x_TD.device)
    other = gate(x_TD[turned])
    assert isinstance(other, Assignments)
    expected = _mixing(routing, len(x_TD), by_expert=True)[turned]
    _require_close(_mixing(other, len(x_TD), by_expert=True), expected, "permuted tokens are routed alike, permuted")


def _mixing(routing: Routing, num_tokens: int, *, by_expert: bool = False) -> Tensor:
    """Return `[T, T]`: what part of every token every token gets when experts do nothing; or `[T, E]`, its weights."""
    if not isinstance(routing, Assignments):
        both = torch.einsum("btes,bues->btu", routing.combine_BTES, routing.dispatch_BTES).detach()
        return torch.block_diag(*both)
    weights = routing.weights_A.detach()
    if routing.keep_A is not None:
        weights = weights * routing.keep_A
    columns = routing.experts_A if by_expert else routing.tokens_A
    size = routing.num_experts if by_expert else num_tokens
    mixing = weights.new_zeros(num_tokens, size)
    return mixing.index_put((routing.tokens_A, columns), weights, accumulate=True)


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise ContractError(f"the contract is broken: {promise}")


def _require_close(got: Tensor, expected: Tensor, promise: str) -> None:
    error = float((got.detach() - expected.detach()).abs().max()) if got.numel() else 0.0
    _require(
        error <= _CLOSE * max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0),
        f"{promise}; off by {error:.3g}",
    )
