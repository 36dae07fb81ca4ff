"""Orders: from token layout to expert layout and back. Rows lie expert by expert, `counts_E[e]` of expert e.

`SparseOrder` sorts and moves rows (dropless, or without what a capacity dropped); `EinsumOrder` multiplies by the dense
masks of GShard, whose experts all have as many rows. T tokens, A assignments, R rows, S slots, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe.errors import ContractError
from moe.gates.capacity import position_in_expert
from moe.precision import in_full
from moe.records import Assignments, Routing, Slots
from moe.sums import Places, gather_tokens, places_of, spread_tokens


class Ordered(NamedTuple):
    """What an order made of the tokens."""

    rows_RD: Tensor
    counts_E: Tensor
    """int64; adds up to R."""
    inverse: Callable[[Tensor], Tensor]
    """Weighted sums of the experts' output `[R, D]`: returns `[T, D]` in the dtype of x."""


class Order(Protocol):
    """Arranges tokens for the experts; the inverse puts together what the experts made of them."""

    def __call__(self, x_TD: Tensor, routing: Routing) -> Ordered:
        """Return the rows, and how to get back."""
        ...


class SparseOrder:
    """Sorts the assignments by expert; within an expert they stay in token order.

    `dtype` is that of the rows, where experts have another than the tokens; sums over a token are in the wider one.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def __call__(self, x_TD: Tensor, routing: Routing) -> Ordered:
        """Return the rows, and how to get back."""
        if not isinstance(routing, Assignments):
            raise ContractError("SparseOrder takes Assignments; for a gate that makes Slots use EinsumOrder")
        chosen_R = torch.argsort(routing.experts_A, stable=True)
        if routing.keep_A is not None:
            chosen_R = chosen_R[routing.keep_A[chosen_R]]
        counts_E = torch.bincount(routing.experts_A[chosen_R], minlength=routing.num_experts)

        if routing.per_token and routing.keep_A is None:
            return self._even(x_TD, routing, places_of(chosen_R, routing.per_token), counts_E)

        def inverse(rows_RD: Tensor) -> Tensor:
            weighted_RD = rows_RD * routing.weights_A[chosen_R].unsqueeze(-1)
            wide = torch.promote_types(weighted_RD.dtype, x_TD.dtype)
            return _sum_tokens(weighted_RD.to(wide), chosen_R, routing).to(x_TD.dtype)

        return Ordered(self._narrowed(x_TD[routing.tokens_A[chosen_R]]), counts_E, inverse)

    def _even(self, x_TD: Tensor, routing: Assignments, places: Places, counts_E: Tensor) -> Ordered:
        """Return the rows where every token has K of them."""
        weights_TK = routing.weights_A.view(places.place_TK.shape)

        def inverse(rows_RD: Tensor) -> Tensor:
            return gather_tokens(rows_RD, weights_TK, places, x_TD.dtype)

        return Ordered(self._narrowed(spread_tokens(x_TD, places)), counts_E, inverse)

    def _narrowed(self, rows_RD: Tensor) -> Tensor:
        return rows_RD if self._dtype is None else rows_RD.to(self._dtype)


def _sum_tokens(weighted_RD: Tensor, chosen_R: Tensor, routing: Assignments) -> Tensor:
    """Sum the rows of each token, in the order of its assignments: `[T, D]`, fp32 or wider where the weights are."""
    width = weighted_RD.shape[-1]
    if routing.per_token is None:
        total = weighted_RD.new_zeros(routing.num_tokens, width)
        return total.index_add(0, routing.tokens_A[chosen_R], weighted_RD)
    every_AD = weighted_RD.new_zeros(len(routing.experts_A), width).index_copy(0, chosen_R, weighted_RD)
    return every_AD.view(routing.num_tokens, routing.per_token, width).sum(1)


class EinsumOrder:
    """Multiplies by dense masks: GShard's order, and the only one for `Slots`.

    Every expert gets the same number of rows, the largest of this rank; those without a token are zeros.
    """

    def __call__(self, x_TD: Tensor, routing: Routing) -> Ordered:
        """Return the rows, and how to get back."""
        slots = routing if isinstance(routing, Slots) else _as_slots(routing)
        x_BTD = x_TD.reshape(*slots.dispatch_BTES.shape[:2], x_TD.shape[-1])
        with in_full(x_TD):
            rows_EBSD = torch.einsum("btes,btd->ebsd", slots.dispatch_BTES.to(x_TD.dtype), x_BTD)
        each = rows_EBSD.shape[1] * rows_EBSD.shape[2]
        counts_E = torch.full((len(rows_EBSD),), each, dtype=torch.int64, device=x_TD.device)

        def inverse(rows_RD: Tensor) -> Tensor:
            combine = slots.combine_BTES
            wide = torch.promote_types(combine.dtype, rows_RD.dtype)
            rows = rows_RD.view(rows_EBSD.shape).to(wide)
            with in_full(rows):
                return torch.einsum("btes,ebsd->btd", combine.to(wide), rows).reshape(x_TD.shape).to(x_TD.dtype)

        return Ordered(rows_EBSD.reshape(-1, x_TD.shape[-1]), counts_E, inverse)


def _as_slots(routing: Assignments) -> Slots:
    tokens, experts, weights = routing.tokens_A, routing.experts_A, routing.weights_A
    if routing.keep_A is not None:
        tokens, experts, weights = tokens[routing.keep_A], experts[routing.keep_A], weights[routing.keep_A]
    position = position_in_expert(experts, routing.num_experts)
    slots = int(position.max()) + 1 if len(position) else 0
    combine = weights.new_zeros(routing.num_tokens, routing.num_experts, slots)
    mask = torch.zeros_like(combine)
    mask[tokens, experts, position] = 1
    combine = combine.index_put((tokens, experts, position), weights)
    return Slots(mask.unsqueeze(0), combine.unsqueeze(0), routing.aux_loss)
