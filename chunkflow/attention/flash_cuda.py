"""Tiles by the flash attention kernels that torch has for CUDA, fp16 and bf16. Not run on a GPU yet: only its calls are
tested, on tensors without memory.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width

The kernels repeat keys for the heads of a group themselves, and count a window from the bottom right: query i sees the
keys j >= i + m - n - left, and under `causal` those of j <= i + m - n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.attention.base import Scoring
from chunkflow.attention.tiles import Tile

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward
_DENSE = (None, None)
"""Cumulative lengths: any tensor there, even an empty one, would make it a call over packed rows."""
_MOST_WIDTH, _WIDTH_UNIT, _OLDEST = 256, 8, (8, 0)


def can_run(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell whether the kernels take heads of this width on this device; they pad none, and need Ampere or newer."""
    fits = dtype in (torch.float16, torch.bfloat16) and width <= _MOST_WIDTH and width % _WIDTH_UNIT == 0
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= _OLDEST


def window_left(tile: Tile) -> int | None:
    """Return how far left of the diagonal through the bottom right corner a query sees; None for as far as there is."""
    return None if tile.window is None else tile.key_stop - tile.query_stop + tile.window - 1


class FlashCuda:
    """`Backend` over aten's pair."""

    causal_rows: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        sizes = (q.shape[2], k.shape[1])
        out, lse, *_ = _forward(
            _queries(q), _keys(k), _keys(v), *_DENSE, *sizes, 0.0, tile.causal, False,
            scale=how.scale, window_size_left=window_left(tile),
        )  # fmt: skip
        return _by_key_head(out[0].transpose(0, 1), q), _by_key_head(lse[0], q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, how: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), device=q.device)
        dq, dk, dv = _backward(
            _queries(dout), _queries(q), _keys(k), _keys(v), _queries(out.to(q.dtype)),
            lse.flatten(0, 1).unsqueeze(0).contiguous(), *_DENSE, q.shape[2], k.shape[1], 0.0, tile.causal, *no_dropout,
            scale=how.scale, window_size_left=window_left(tile),
        )  # fmt: skip
        return _by_key_head(dq[0].transpose(0, 1), q), dk[0].transpose(0, 1), dv[0].transpose(0, 1)


def _queries(x: Tensor) -> Tensor:
    """Lay [Hk, G, n, D] as the kernels want it: [1, n, Hk * G, D]."""
    return x.flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _keys(x: Tensor) -> Tensor:
    """Lay [Hk, m, D] as [1, m, Hk, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _by_key_head(x: Tensor, q: Tensor) -> Tensor:
    """View [Hk * G, ...] as [Hk, G, ...]."""
    return x.unflatten(0, q.shape[:2])
