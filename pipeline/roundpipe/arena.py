"""Device memory, accounted: what a slot brings to a device is counted, and more than the cap is an error.

Counted: weights, gradients, inputs and outputs of slots, and what the graph of a micro-batch keeps for its backward
(each storage once). Not counted: what an operation needs while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.errors import MemoryCapError


class Lease:
    """Some bytes of an arena, until `free`."""

    def __init__(self, arena: Arena, nbytes: int) -> None:
        self._arena, self.nbytes = arena, nbytes

    def free(self) -> None:
        """Give them back; a second time does nothing."""
        nbytes, self.nbytes = self.nbytes, 0
        self._arena._give_back(nbytes)


class Arena:
    """The memory of one device. `cap_bytes` None counts only. Safe for several threads."""

    def __init__(self, *, device: int, cap_bytes: int | None = None) -> None:
        self.used_bytes = self.peak_bytes = 0
        self.make_room: Callable[[int], None] = lambda nbytes: None
        """Called when `lease` finds no room for so many bytes, to send away what is there ahead of its time."""
        self._device, self._cap_bytes = device, cap_bytes
        self._lock = threading.Lock()

    def fits(self, nbytes: int) -> bool:
        """Return whether so many bytes could be had now."""
        return self._cap_bytes is None or self.used_bytes + nbytes <= self._cap_bytes

    def try_lease(self, nbytes: int) -> Lease | None:
        """Take some bytes, or None when there is no room."""
        with self._lock:
            if not self.fits(nbytes):
                return None
            self.used_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return Lease(self, nbytes)

    def lease(self, nbytes: int, *, slot: int, what: str) -> Lease:
        """Take some bytes, making room for them. Raises MemoryCapError when they are over the cap all the same."""
        lease = self.try_lease(nbytes)
        if lease is None:
            self.make_room(nbytes)
            lease = self.try_lease(nbytes)
        if lease is None:
            raise self.refusal(nbytes, slot=slot, what=what)
        return lease

    def refusal(self, nbytes: int, *, slot: int, what: str) -> MemoryCapError:
        """Return the error to raise when there is no room."""
        return MemoryCapError(
            f"device {self._device}, slot {slot}: {nbytes:,} bytes for {what}, with {self.used_bytes:,} in use "
            f"already, are over the cap of {self._cap_bytes:,}; use smaller slots, shorter micro-batches, fewer open "
            "slots, or raise the cap"
        )

    @contextmanager
    def graph(self, slot: int, known: set[int], leases: list[Lease]) -> Iterator[None]:
        """Lease what autograd keeps of the operations inside, save storages (by address) in `known`, into `leases`."""

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                leases.append(self.lease(storage.nbytes(), slot=slot, what="activations of one micro-batch"))
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used_bytes -= nbytes
