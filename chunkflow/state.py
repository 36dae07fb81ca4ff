"""K and V of one long sequence, per layer, while its chunks are trained.

Hk key/value heads, S tokens before the group's last chunk, n tokens of one chunk, D width of a key or of a value

Rows are written by offset and never appended, so running a chunk a second time is harmless. Gradients that later chunks
send to earlier keys and values are added up in fp32 (fp64 for fp64 models): the backward of chunk j adds to all rows
before it, and a chunk's own rows are complete when every later chunk is done, hence the descending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow.errors import UnsupportedModelError


class LayerState:
    """Buffers `[Hk, S, D]` of one attention layer: keys and values, and their gradients once there are any."""

    def __init__(self, capacity: int, k: Tensor, v: Tensor, *, offload: bool) -> None:
        self.k, self.v = (_buffer(x, capacity, x.dtype, offload=offload) for x in (k, v))
        self.grads: tuple[Tensor, Tensor] | None = None
        self.offload = offload
        self.written = 0
        """Rows `0 .. written` hold keys and values; the others are raw memory."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the accumulators of keys and values, zero at first."""
        if self.grads is None:
            wide = torch.promote_types(self.k.dtype, torch.float32)
            capacity = self.k.shape[1]
            dk, dv = (_buffer(x, capacity, wide, offload=self.offload).zero_() for x in (self.k, self.v))
            self.grads = dk, dv
        return self.grads


class GroupState:
    """State of one live group: a `LayerState` per attention layer, for the `capacity` tokens before its last chunk.

    With `offload` it lives in the host's memory, pinned where there is an accelerator, and blocks of it travel to the
    device as attention reads them: device memory then does not grow with the sequence.
    """

    def __init__(self, capacity: int, *, offload: bool = False) -> None:
        self.capacity = capacity
        self.offload = offload
        self.layers: dict[int, LayerState] = {}

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keep k, v [Hk, n, D] of tokens `start .. start + n`; the last chunk's are nobody's prefix and not kept."""
        if start >= self.capacity:
            return
        if layer not in self.layers:
            self.layers[layer] = LayerState(self.capacity, k, v, offload=self.offload)
        kept, stop = self.layers[layer], start + k.shape[1]
        kept.k[:, start:stop] = k
        kept.v[:, start:stop] = v
        if start <= kept.written < stop:
            kept.written = stop

    def read(self, layer: int, start: int, stop: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values [Hk, stop - start, D] of tokens `start .. stop`: views, or copies on `device`.

        Raises UnsupportedModelError when the layer has not run for all of them.
        """
        kept = self.layers.get(layer)
        written = 0 if kept is None else kept.written
        if kept is None or written < stop:
            raise UnsupportedModelError(
                f"attention layer {layer} ran for {written} of the {stop} tokens before its chunk; a layer that is "
                "skipped at random has no keys and values for later chunks: turn layer dropout off"
            )
        k, v = kept.k[:, start:stop], kept.v[:, start:stop]
        return (k, v) if device is None else (k.to(device, non_blocking=True), v.to(device, non_blocking=True))

    def add_gradient(self, layer: int, start: int, dk: Tensor, dv: Tensor) -> None:
        """Add what a later chunk sends to the keys and values of tokens `start ..`."""
        for total, part in zip(self.layers[layer].gradients(), (dk, dv), strict=True):
            total[:, start : start + part.shape[1]] += part.to(total.device)

    def gradient(
        self, layer: int, start: int, length: int, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return what all later chunks sent to tokens `start .. start + length`; None for the last chunk."""
        if start >= self.capacity:
            return None
        dk, dv = (grad[:, start : start + length].to(device) for grad in self.layers[layer].gradients())
        return dk, dv


def _buffer(like: Tensor, capacity: int, dtype: torch.dtype, *, offload: bool) -> Tensor:
    """Return raw memory [Hk, capacity, D], on the host if it is offloaded."""
    size = (like.shape[0], capacity, like.shape[2])
    if not offload:
        return like.new_empty(size, dtype=dtype)
    return torch.empty(size, dtype=dtype, pin_memory=torch.accelerator.is_available())
