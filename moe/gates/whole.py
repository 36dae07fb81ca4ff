"""Gates that look at many tokens at once, and so are not causal: expert choice and SoftMoE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import MoeConfigError
from moe.gates.capacity import capacity_rows
from moe.gates.router import Router, widened
from moe.precision import in_full
from moe.records import Assignments, Slots


class ExpertChoiceGate(Router):
    """Expert choice (arXiv 2202.09368): every expert takes its best tokens, of those on this rank.

    `top_k` times the tokens, spread evenly, is what the experts take; a token may get any number of experts, also none.
    """

    def forward(self, x: Tensor) -> Assignments:
        """Route `[..., D]`."""
        probabilities_TE = self.logits(x).softmax(-1)
        num_tokens = len(probabilities_TE)
        rows = min(num_tokens, capacity_rows(num_tokens, self.top_k, self.num_experts, 1.0))
        weights_EC, tokens_EC = probabilities_TE.t().topk(rows, dim=-1)
        experts_E = torch.arange(self.num_experts, device=x.device)
        return Assignments(
            tokens_A=tokens_EC.reshape(-1),
            experts_A=experts_E.repeat_interleave(rows),
            weights_A=weights_EC.reshape(-1),
            num_tokens=num_tokens,
            num_experts=self.num_experts,
        )


class SoftGate(nn.Module):
    """SoftMoE (arXiv 2308.00951): slots are averages over the tokens of one sequence, outputs averages over slots.

    Both factors are normalised to length one, as the paper has it for wide models.
    """

    def __init__(self, width: int, num_experts: int, *, slots: int) -> None:
        super().__init__()
        if num_experts < 1 or slots < 1:
            raise MoeConfigError(f"{num_experts} experts of {slots} slots; there must be at least 1 of each")
        self.num_experts, self.slots = num_experts, slots
        self.phi = nn.Parameter(torch.empty(width, num_experts * slots))
        nn.init.normal_(self.phi, std=width**-0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Slots:
        """Route `[B, T, D]`, every sequence for itself, or `[T, D]`, one sequence."""
        x_BTD = widened(x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]))
        keys = self.scale.to(x_BTD.dtype) * F.normalize(self.phi.to(x_BTD.dtype), dim=0)
        with in_full(x_BTD):
            logits_BTS = F.normalize(x_BTD, dim=-1) @ keys
        shape = (*logits_BTS.shape[:2], self.num_experts, self.slots)
        return Slots(logits_BTS.softmax(1).view(shape), logits_BTS.softmax(2).view(shape))
