"""Tiles with a cap on their scores (Gemma 2), by the `flash_attn` package on CUDA, fp16 and bf16. Not run on a GPU yet.

Hk key/value heads, G query heads per key/value head, n queries, m keys, D head width

The package's kernels are those of aten's pair, which knows packed rows and windows as well but takes no cap; hence caps
are all that this is for. `flash_attn_varlen_func` itself cannot serve: its backward takes the log-sum-exp of its own
forward, and tiles need that of all tiles merged. The two operators below it take what they are given.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from chunkflow.attention.base import Scoring
from chunkflow.attention.flash_cuda import window_left
from chunkflow.attention.tiles import Tile

_MODULE = "flash_attn.flash_attn_interface"
_FORWARD, _BACKWARD = "_wrapped_flash_attn_varlen_forward", "_wrapped_flash_attn_varlen_backward"
"""There since version 2.7, which also lays out the log-sum-exp by head and row."""


def kernels() -> Any | None:
    """Return the module with the operators; None where the package is not installed, too old, or another one."""
    if find_spec("flash_attn") is None or find_spec(_MODULE) is None:  # FA4 comes under the first name alone
        return None
    module = import_module(_MODULE)
    return module if hasattr(module, _FORWARD) and hasattr(module, _BACKWARD) else None


class FlashPackage:
    """`Backend` over the package's operators for packed rows, one sequence a call."""

    causal_rows: int | None = None

    def __init__(self, module: Any) -> None:
        self._forward, self._backward = getattr(module, _FORWARD), getattr(module, _BACKWARD)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, how: Scoring) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        out, lse, *_ = self._forward(_rows(q.flatten(0, 1)), _rows(k), _rows(v), **_arguments(q, k, tile, how))
        return _rows(out).unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: Tile, how: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        dout_, q_, out_ = (_rows(x.to(q.dtype).flatten(0, 1)) for x in (dout, q, out))
        k_, v_ = _rows(k), _rows(v)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_, k_, v_))
        self._backward(
            dout_, q_, k_, v_, out_, lse.flatten(0, 1).contiguous(), dq, dk, dv,
            **_arguments(q, k, tile, how), deterministic=False,
        )  # fmt: skip
        return _rows(dq).unflatten(0, q.shape[:2]), _rows(dk), _rows(dv)


def _rows(x: Tensor) -> Tensor:
    """Turn [heads, n, D] into [n, heads, D], and back."""
    return x.transpose(0, 1)


def _arguments(q: Tensor, k: Tensor, tile: Tile, how: Scoring) -> dict[str, Any]:
    left, n, m = window_left(tile), q.shape[2], k.shape[1]
    return {
        "cu_seqlens_q": torch.tensor([0, n], dtype=torch.int32, device=q.device),
        "cu_seqlens_k": torch.tensor([0, m], dtype=torch.int32, device=q.device),
        "max_seqlen_q": n,
        "max_seqlen_k": m,
        "dropout_p": 0.0,
        "softmax_scale": how.scale,
        "causal": tile.causal,
        "window_size_left": -1 if left is None else left,
        "window_size_right": -1,  # `causal` makes it 0
        "softcap": how.softcap or 0.0,
        "alibi_slopes": None,
    }
