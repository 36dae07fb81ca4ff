"""K and V of one long sequence, per layer, while its chunks are trained.

Hk key/value heads, S tokens before the group's last chunk, n tokens of one chunk, D head width

Rows are written by offset and never appended, so running a chunk a second time is harmless. Gradients that later chunks
send to earlier keys and values are added up in fp32 (fp64 for fp64 models): the backward of chunk j adds to all rows
before it, and a chunk's own rows are complete when every later chunk is done, hence the descending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.errors import UnsupportedModelError


class LayerState:
    """Buffers `[2, Hk, S, D]` of one attention layer: keys and values, and their gradients once there are any."""

    def __init__(self, capacity: int, like: Tensor) -> None:
        heads, _, width = like.shape
        self.kv = like.new_empty(2, heads, capacity, width)
        self.grad: Tensor | None = None
        self.written = 0
        """Rows `0 .. written` hold keys and values; the others are raw memory."""

    def gradients(self) -> Tensor:
        """Return the accumulators [2, Hk, S, D], zero at first."""
        if self.grad is None:
            wide = torch.promote_types(self.kv.dtype, torch.float32)
            self.grad = torch.zeros_like(self.kv, dtype=wide)
        return self.grad


class GroupState:
    """State of one live group: a `LayerState` per attention layer, for the `capacity` tokens before its last chunk."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.layers: dict[int, LayerState] = {}

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keep k, v [Hk, n, D] of tokens `start .. start + n`; the last chunk's are nobody's prefix and not kept."""
        if start >= self.capacity:
            return
        if layer not in self.layers:
            self.layers[layer] = LayerState(self.capacity, k)
        kept, stop = self.layers[layer], start + k.shape[1]
        kept.kv[0, :, start:stop] = k
        kept.kv[1, :, start:stop] = v
        if start <= kept.written < stop:
            kept.written = stop

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return views of the keys and values [Hk, stop - start, D] of tokens `start .. stop`.

        Raises UnsupportedModelError when the layer has not run for all of them.
        """
        kept = self.layers.get(layer)
        written = 0 if kept is None else kept.written
        if kept is None or written < stop:
            raise UnsupportedModelError(
                f"attention layer {layer} ran for {written} of the {stop} tokens before its chunk; a layer that is "
                "skipped at random has no keys and values for later chunks: turn layer dropout off"
            )
        return kept.kv[0, :, start:stop], kept.kv[1, :, start:stop]

    def add_gradient(self, layer: int, start: int, dk: Tensor, dv: Tensor) -> None:
        """Add what a later chunk sends to the keys and values of tokens `start ..`."""
        grad = self.layers[layer].gradients()
        grad[0, :, start : start + dk.shape[1]] += dk
        grad[1, :, start : start + dk.shape[1]] += dv

    def gradient(self, layer: int, start: int, length: int) -> tuple[Tensor, Tensor] | None:
        """Return what all later chunks sent to tokens `start .. start + length`; None for the last chunk."""
        if start >= self.capacity:
            return None
        grad = self.layers[layer].gradients()
        return grad[0, :, start : start + length], grad[1, :, start : start + length]
