"""What the gates share: scores in fp32 or wider, whatever the model's dtype. x is `[..., D]`, T tokens in all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import MoeConfigError
from moe.precision import in_full


class Router(nn.Module):
    """Base of the gates that score every token against every expert: `weight[E, D]`."""

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise MoeConfigError(f"top_k is {top_k} of {num_experts} experts; it must be between 1 and {num_experts}")
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        """Return `[T, E]`, fp32 or wider."""
        x_TD = widened(x.reshape(-1, x.shape[-1]))
        with in_full(x_TD):
            return F.linear(x_TD, self.weight.to(x_TD.dtype))


def widened(x: Tensor) -> Tensor:
    """Return x in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def balance_loss(probabilities_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Return E times the sum over experts of (share of assignments) times (mean probability), 0-d: 1 when balanced.

    GShard (arXiv 2006.16668, algorithm 1) with K = 1, its first choices; Switch Transformer, equation 4.
    The gradient passes through the probabilities. Zero where there are no tokens.
    """
    num_tokens, num_experts = probabilities_TE.shape
    if not num_tokens:
        return probabilities_TE.sum()
    counts_E = torch.bincount(experts_TK.reshape(-1), minlength=num_experts)
    share_E = counts_E.to(probabilities_TE.dtype) / experts_TK.numel()
    return num_experts * (share_E * probabilities_TE.mean(0)).sum()
