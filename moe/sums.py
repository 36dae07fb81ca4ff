"""Rows of tokens, and sums over the rows of a token, where every token has K of them: each is the other's gradient.

Autograd's gradient of an index adds element by element into zeros; a gradient of whole rows takes half of the time.
T tokens, K rows each, R = T x K rows in any order, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.precision import in_full


class Places(NamedTuple):
    """Which rows a token has, both ways."""

    chosen_R: Tensor
    """Which assignment each row is; assignment a is of token a // K."""
    place_TK: Tensor
    """In which row each assignment is."""


def places_of(chosen_R: Tensor, per_token: int) -> Places:
    """Return the places of all assignments, from which assignment each row is."""
    place_A = torch.empty_like(chosen_R)
    place_A[chosen_R] = torch.arange(len(chosen_R), device=chosen_R.device)
    return Places(chosen_R, place_A.view(-1, per_token))


def spread_tokens(x_TD: Tensor, places: Places) -> Tensor:
    """Return a row for each place of a token, `[R, D]`."""
    return _Spread.apply(x_TD, *places)  # pyright: ignore[reportReturnType]


def gather_tokens(rows_RD: Tensor, weights_TK: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """Return each token's rows, weighted and added up in the order of its places, `[T, D]` of that dtype.

    Products and sums are in the widest dtype of rows, weights and `dtype`, sums in fp32 at least. Where D is a multiple
    of 32 the bits are those of `torch.sum` over the places, as transformers has it.
    """
    return _Gather.apply(rows_RD, weights_TK, *places, dtype)  # pyright: ignore[reportReturnType]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, chosen_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, chosen_R // place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (place_TK,) = ctx.saved_tensors
        return _sum(grads[0], None, place_TK, grads[0].dtype), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_TK: Tensor, chosen_R: Tensor, place_TK: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, chosen_R, place_TK)
        return _sum(rows_RD, weights_TK, place_TK, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, weights_TK, chosen_R, place_TK = ctx.saved_tensors
        wide = _wide(rows_RD, weights_TK)
        grad_RD, grad_TK = grads[0].to(wide).index_select(0, chosen_R // place_TK.shape[1]), None
        if ctx.needs_input_grad[1]:
            with in_full(grad_RD):
                grad_TK = torch.linalg.vecdot(grad_RD, rows_RD.to(wide))[place_TK].to(weights_TK.dtype)
        weights_R = weights_TK.to(wide).reshape(-1).index_select(0, chosen_R)
        return grad_RD.mul_(weights_R.unsqueeze(-1)).to(rows_RD.dtype), grad_TK, None, None, None


def _wide(rows: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, weights.dtype)


def _sum(rows_RD: Tensor, weights_TK: Tensor | None, place_TK: Tensor, dtype: torch.dtype) -> Tensor:
    product = rows_RD.dtype if weights_TK is None else _wide(rows_RD, weights_TK)
    wide = torch.promote_types(torch.promote_types(product, dtype), torch.float32)
    total_TD = None
    for k in range(place_TK.shape[1]):
        part_TD = rows_RD.index_select(0, place_TK[:, k]).to(product)
        if weights_TK is not None:
            part_TD = part_TD.mul_(weights_TK[:, k, None])
        part_TD = part_TD.to(wide)
        total_TD = part_TD if total_TD is None else total_TD.add_(part_TD)
    assert total_TD is not None
    return total_TD.to(dtype)
