"""Values that pass between the six sub-modules of a layer: gate, order, dispatch, expert, combine, inverse order.

Shapes: T tokens of this rank, D model width, E experts of the layer, K experts per token, A assignments (a token sent
to an expert), R rows (assignments that are carried out, expert by expert), B sequences, S slots of an expert each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Assignments:
    """What a gate decided: assignment a sends token `tokens_A[a]` to expert `experts_A[a]` with weight `weights_A[a]`.

    The weights carry the gradient to the router. `keep_A` is False where a capacity dropped the assignment.
    """

    tokens_A: Tensor
    experts_A: Tensor
    weights_A: Tensor
    num_tokens: int
    num_experts: int
    per_token: int | None = None
    """K, where assignment a belongs to token a // K: sums are then taken in that order, as transformers does."""
    keep_A: Tensor | None = None
    aux_loss: Tensor | None = None
    """0-d, of this rank's tokens, unscaled; None where the gate has none."""


@dataclass(frozen=True, slots=True)
class Slots:
    """What a gate decided, densely: slot s of expert e is `dispatch_BTES[b, :, e, s] @ x_BTD[b]`, for each sequence b.

    The output of token t is the sum over all slots of its sequence, weighted by `combine_BTES[b, t]`.
    """

    dispatch_BTES: Tensor
    combine_BTES: Tensor
    aux_loss: Tensor | None = None


Routing = Assignments | Slots


class ChunkInfo(NamedTuple):
    """Where a hook is: which layer, which of how many chunks, and in which direction."""

    layer: str
    chunk: int
    chunks: int
    backward: bool


class MoeOutput(NamedTuple):
    """What a layer returns."""

    hidden: Tensor
    """Shape and dtype of the input."""
    aux_loss: Tensor | None
    """0-d, unscaled, of this rank's tokens; add `coefficient * aux_loss` to the loss."""
    rows_per_expert_E: Tensor
    """int64: rows this rank sent to each expert."""


def top_k_assignments(
    experts_TK: Tensor, weights_TK: Tensor, num_experts: int, aux_loss: Tensor | None = None
) -> Assignments:
    """Return the assignments of a gate that gives every token K experts; both tensors are `[T, K]`."""
    num_tokens, per_token = experts_TK.shape
    tokens_A = torch.arange(num_tokens, device=experts_TK.device).repeat_interleave(per_token)
    return Assignments(
        tokens_A=tokens_A,
        experts_A=experts_TK.reshape(-1),
        weights_A=weights_TK.reshape(-1),
        num_tokens=num_tokens,
        num_experts=num_experts,
        per_token=per_token,
        aux_loss=aux_loss,
    )
