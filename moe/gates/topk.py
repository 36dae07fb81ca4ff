"""Gates that give every token K experts: GShard, sigmoid, X-MoE, the softmax of Mixtral and Qwen3-MoE, DeepSeek-V3.

Each returns `Assignments` in token order. T tokens, E experts, K per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import MoeConfigError
from moe.gates.capacity import capacity_rows, drop_over_capacity
from moe.gates.router import Router, balance_loss, widened
from moe.precision import in_full
from moe.records import Assignments, top_k_assignments


class SoftmaxGate(Router):
    """Softmax over all experts, then the largest K: Mixtral, OLMoE and Qwen3-MoE."""

    def __init__(self, width: int, num_experts: int, top_k: int, *, normalise: bool = True) -> None:
        super().__init__(width, num_experts, top_k)
        self.normalise = normalise

    def forward(self, x: Tensor) -> Assignments:
        """Route `[..., D]`; `normalise` makes a token's weights add up to one."""
        probabilities_TE = self.logits(x).softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.top_k, dim=-1)
        if self.normalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return top_k_assignments(experts_TK, weights_TK, self.num_experts, balance_loss(probabilities_TE, experts_TK))


class GShardGate(Router):
    """GShard (arXiv 2006.16668): normalised top-k under a capacity, balance loss over first choices.

    The second choice is always tried; GShard tries it with a probability proportional to its weight.
    """

    def __init__(self, width: int, num_experts: int, top_k: int = 2, *, capacity_factor: float = 1.25) -> None:
        super().__init__(width, num_experts, top_k)
        capacity_rows(1, 1, 1, capacity_factor)
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor) -> Assignments:
        """Route `[..., D]`."""
        probabilities_TE = self.logits(x).softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        aux_loss = balance_loss(probabilities_TE, experts_TK[:, :1])
        rows = capacity_rows(len(experts_TK), self.top_k, self.num_experts, self.capacity_factor)
        return drop_over_capacity(top_k_assignments(experts_TK, weights_TK, self.num_experts, aux_loss), rows)


class SigmoidGate(Router):
    """Largest K scores, each weighted by its own sigmoid: BASE (arXiv 2103.16716) and StableMoE (arXiv 2204.08396)."""

    def forward(self, x: Tensor) -> Assignments:
        """Route `[..., D]`."""
        logits_TE = self.logits(x)
        scores_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
        aux_loss = balance_loss(logits_TE.softmax(-1), experts_TK)
        return top_k_assignments(experts_TK, scores_TK.sigmoid(), self.num_experts, aux_loss)


class XMoEGate(nn.Module):
    """X-MoE (arXiv 2204.09179): cosine of a narrow projection of the token and an expert, over a learnt temperature.

    `routing_width` is half the number of experts in the paper.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, *, routing_width: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise MoeConfigError(f"top_k is {top_k} of {num_experts} experts; it must be between 1 and {num_experts}")
        if routing_width < 1:
            raise MoeConfigError(f"routing_width is {routing_width}; it must be at least 1")
        self.num_experts, self.top_k = num_experts, top_k
        self.projection = nn.Linear(width, routing_width, bias=False)
        self.embeddings = nn.Parameter(torch.empty(num_experts, routing_width))
        nn.init.normal_(self.embeddings, std=routing_width**-0.5)
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Assignments:
        """Route `[..., D]`."""
        x_TD = widened(x.reshape(-1, x.shape[-1]))
        with in_full(x_TD):
            narrow = F.normalize(F.linear(x_TD, self.projection.weight.to(x_TD.dtype)), dim=-1)
            cosine_TE = narrow @ F.normalize(self.embeddings.to(x_TD.dtype), dim=-1).t()
        probabilities_TE = (cosine_TE / self.temperature.to(x_TD.dtype).clamp(min=0.01)).softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.top_k, dim=-1)
        return top_k_assignments(experts_TK, weights_TK, self.num_experts, balance_loss(probabilities_TE, experts_TK))


class DeepSeekV3Gate(Router):
    """DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores, the best groups first, and a bias to balance.

    `bias_E` counts in the selection only, never in the weights; `update_bias` moves it, instead of an auxiliary loss.
    """

    bias_E: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        top_groups: int = 1,
        normalise: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(width, num_experts, top_k)
        if num_experts % num_groups or not 1 <= top_groups <= num_groups:
            raise MoeConfigError(
                f"{num_experts} experts in {num_groups} groups of which {top_groups} are searched; "
                "the groups must divide the experts and be at least as many as are searched"
            )
        if top_k > top_groups * num_experts // num_groups:
            raise MoeConfigError(
                f"top_k is {top_k}, but the {top_groups} groups that are searched have only "
                f"{top_groups * num_experts // num_groups} experts; search more groups"
            )
        self.num_groups, self.top_groups, self.normalise, self.scale = num_groups, top_groups, normalise, scale
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Assignments:
        """Route `[..., D]`."""
        scores_TE = self.logits(x).sigmoid()
        experts_TK = self._select(scores_TE.detach() + self.bias_E.to(scores_TE.dtype))
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return top_k_assignments(experts_TK, weights_TK * self.scale, self.num_experts)

    def _select(self, choice_TE: Tensor) -> Tensor:
        groups_TGe = choice_TE.unflatten(1, (self.num_groups, self.num_experts // self.num_groups))
        best_TG = groups_TGe.topk(min(2, groups_TGe.shape[-1]), dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        kept_TG.scatter_(1, best_TG.topk(self.top_groups, dim=-1).indices, True)
        # -inf, not 0: a score may be below zero once the bias is added, and 0 would win.
        groups_TGe = groups_TGe.masked_fill(~kept_TG.unsqueeze(-1), float("-inf"))
        return groups_TGe.reshape(choice_TE.shape).topk(self.top_k, dim=-1).indices

    @torch.no_grad()
    def update_bias(self, rows_per_expert_E: Tensor, *, speed: float = 1e-3) -> None:
        """Raise the bias of experts below the mean load by `speed`, lower that above it.

        `rows_per_expert_E` is of the whole step and all ranks: sum it over the data axes first, or the biases differ.
        """
        load_E = rows_per_expert_E.to(self.bias_E.device, torch.float64)  # bf16 cannot tell 1000 rows from 1001
        self.bias_E += speed * torch.sign(load_E.mean() - load_E).to(self.bias_E.dtype)
