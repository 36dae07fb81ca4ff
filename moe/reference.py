"""The oracle: the plainest loop over tokens and experts, on one rank, differentiable, in any dtype. Slow on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe.records import Routing, Slots


def reference_moe(x: Tensor, routing: Routing, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Return what a layer must return for `x[..., D]`; `experts[e]` maps `[n, D]` to `[n, D]`."""
    if isinstance(routing, Slots):
        return _slots(x, routing, experts)
    x_TD = x.reshape(-1, x.shape[-1])
    out: list[Tensor] = [torch.zeros_like(row) for row in x_TD]
    for a in range(len(routing.experts_A)):
        if routing.keep_A is not None and not routing.keep_A[a]:
            continue
        token, expert = int(routing.tokens_A[a]), int(routing.experts_A[a])
        out[token] = out[token] + routing.weights_A[a] * experts[expert](x_TD[token : token + 1])[0]
    return torch.stack(out).view_as(x) if out else x


def _slots(x: Tensor, routing: Slots, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    sequences = x if x.dim() == 3 else x.unsqueeze(0)
    out = []
    for x_TD, dispatch_TES, combine_TES in zip(sequences, routing.dispatch_BTES, routing.combine_BTES, strict=True):
        total = torch.zeros_like(x_TD)
        for e, expert in enumerate(experts):
            total = total + combine_TES[:, e] @ expert(dispatch_TES[:, e].t() @ x_TD)
        out.append(total)
    return torch.stack(out).view_as(x)


def reference_experts(gate_up_EID: Tensor, down_EDI: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Return one function for each stacked SiLU expert."""

    def one(e: int) -> Callable[[Tensor], Tensor]:
        def run(rows_ND: Tensor) -> Tensor:
            gate, up = (rows_ND @ gate_up_EID[e].t()).chunk(2, dim=-1)
            return (torch.nn.functional.silu(gate) * up) @ down_EDI[e].t()

        return run

    return [one(e) for e in range(len(down_EDI))]
