"""Under autocast experts multiply in fewer bits, and routers, masks and weighted sums do not."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def narrowed(x: Tensor) -> Tensor:
    """Return x as autocast, where it is on, gives it to a product; it knows neither exchanges nor `grouped_mm`."""
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def in_full(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which products on the device of x keep their dtype, also under autocast."""
    return torch.autocast(x.device.type, enabled=False)
