"""In what precision products are computed; weights, gradients and moments stay fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a model with fp32 weights computes in a precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of products in a precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
