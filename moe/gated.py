"""`act(gate) * up` of two halves that lie side by side, as a product gives them: both gradients go where they belong.

Autograd makes the gradient of each half and copies them together; for SiLU they are written in place, to the same bits.
N rows, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import MoeError


def gated(gate_up_N2I: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `[N, I]` from `[N, 2I]`, the gate first. Double backward raises MoeError."""
    if (act is F.silu or type(act) is nn.SiLU) and gate_up_N2I.device.type == "cpu":
        return _SiluProduct.apply(gate_up_N2I)  # pyright: ignore[reportReturnType]
    gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
    return act(gate_NI) * up_NI


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2I: Tensor) -> Tensor:
        gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
        act_NI = F.silu(gate_NI)
        ctx.save_for_backward(gate_up_N2I, act_NI)
        return act_NI * up_NI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise MoeError("double backward (create_graph=True) does not pass through the gated product of experts")
        gate_up_N2I, act_NI = ctx.saved_tensors
        gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
        found_N2I = torch.empty_like(gate_up_N2I)
        of_gate_NI, of_up_NI = found_N2I.chunk(2, dim=-1)
        torch.mul(grads[0], act_NI, out=of_up_NI)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up_NI, gate_NI, grad_input=of_gate_NI)
        return found_N2I
