"""Tiles by torch's flash attention for CUDA, fp16 and bf16. Not run on a GPU yet: only its calls are tested.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.attention.base import Scoring
from chunkflow.attention.flash_cpu import _fold, _fold_keys, _unfold
from chunkflow.attention.masked import Masked
from chunkflow.attention.tiles import Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


_DENSE, _NO_SEED = (None, None), (None, None)
"""Cumulative lengths: any tensor there, even an empty one, would make it a call over packed rows. Seeds of dropout."""
_MOST_WIDTH, _WIDTH_UNIT, _OLDEST = 256, 8, (8, 0)


def can_run(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell whether the kernel takes heads of this width on this device; it pads none, and needs Ampere or newer."""
    fits = dtype in (torch.float16, torch.bfloat16) and width <= _MOST_WIDTH and width % _WIDTH_UNIT == 0
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= _OLDEST


class FlashCuda:
    """`Backend` over aten's pair. It takes no mask, so the edges of a window go through plain matrix products."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        if tile.window is not None:
            return Masked().forward(q, k, v, tile=tile, how=how)
        out, lse, *_ = _forward(_fold(q, tile), *_fold_keys(q, k, v, tile), 0.0, tile.causal, scale=how.scale)
        return _unfold(out, q, tile), _unfold(lse, q, tile)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, how: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        if tile.window is not None:
            return Masked().backward(dout, q, k, v, out, lse, tile=tile, how=how)
        queries, keys = _fold(q, tile), _fold_keys(q, k, v, tile)
        dq, dk, dv = _backward(
            _fold(dout, tile).contiguous(),
            queries,
            *keys,
            _fold(out.to(q.dtype), tile),
            _fold(lse, tile).contiguous(),
            *_DENSE,
            queries.shape[2],
            keys[0].shape[2],
            0.0,
            tile.causal,
            *_NO_SEED,
            scale=how.scale,
        )
        return _unfold(dq, q, tile), dk.sum(0), dv.sum(0)
