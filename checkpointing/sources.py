"""Where the bytes of a block come from; `copy` is the only way they leave live memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from math import prod
from typing import Protocol

import numpy as np
import torch
import xxhash

from checkpointing.datafile import octets
from checkpointing.dtypes import itemsize
from checkpointing.errors import StateError
from checkpointing.providers.base import Chunk, Cost, Place, Provider
from checkpointing.providers.composite import CompositeProvider
from checkpointing.providers.tensors import TensorProvider
from checkpointing.slabs import Slab


class Source(Protocol):
    """Random access to the bytes of a provider."""

    def copy(self, at: int, slab: Slab, slab_at: int, length: int) -> None:
        """Copy `length` bytes from `at` into a slab."""
        ...


class HostSource:
    """Bytes in host memory, in one or more buffers."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._arrays = [np.frombuffer(chunk, dtype=np.uint8) for chunk in chunks if len(chunk)]  # kept alive
        ends = np.cumsum([0, *(array.nbytes for array in self._arrays)]).tolist()
        self._parts = [(ends[i], ends[i + 1], array.ctypes.data) for i, array in enumerate(self._arrays)]
        self.num_bytes = ends[-1]

    def digest(self) -> str:
        """Return the hash of all bytes."""
        hash_ = xxhash.xxh3_64()
        for array in self._arrays:
            hash_.update(array.data)
        return hash_.hexdigest()

    def copy(self, at: int, slab: Slab, slab_at: int, length: int) -> None:
        """Copy without the interpreter's lock: ctypes gives it up."""
        end = at + length
        for begin, stop, address in self._parts:
            low, high = max(at, begin), min(end, stop)
            if low < high:
                ctypes.memmove(slab.address + slab_at + low - at, address + low - begin, high - low)


class TensorSource:
    """A row-major tensor in host memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._address = tensor, tensor.data_ptr()  # the tensor keeps its memory alive

    def copy(self, at: int, slab: Slab, slab_at: int, length: int) -> None:
        """Copy without the interpreter's lock: ctypes gives it up."""
        ctypes.memmove(slab.address + slab_at, self._address + at, length)


class DeviceSource:
    """A row-major tensor in the memory of an accelerator."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bytes = octets(tensor.detach())

    def copy(self, at: int, slab: Slab, slab_at: int, length: int) -> None:
        """Copy through the current stream, and wait for it."""
        into = torch.frombuffer(slab.view, dtype=torch.uint8, count=length, offset=slab_at)
        into.copy_(self._bytes[at : at + length])


class LaterSource:
    """Bytes that another thread is making."""

    def __init__(self, made: Future[HostSource]) -> None:
        self._made = made

    def copy(self, at: int, slab: Slab, slab_at: int, length: int) -> None:
        """Copy once they are there; raises what making them raised."""
        self._made.result().copy(at, slab, slab_at, length)


def view_source(name: str, provider: Provider) -> Source | None:
    """Return a source of what needs no work; None where it does. Raises StateError as `made_source`."""
    if provider.cost is not Cost.VIEW:
        return None
    if isinstance(provider, TensorProvider):
        return DeviceSource(provider.local) if provider.place is Place.DEVICE else TensorSource(provider.local)
    return _whole(name, provider, HostSource(list(provider.chunks())))


def made_source(name: str, provider: Provider) -> HostSource:
    """Return a source of what needs work, after doing it.

    Raises StateError when a provider gives other than the bytes of its shape and dtype.
    """
    if isinstance(provider, TensorProvider | CompositeProvider):  # one chunk, made for us
        return HostSource(list(provider.chunks()))
    # Copies: another provider may use one buffer for all its chunks.
    return _whole(name, provider, HostSource([bytes(chunk) for chunk in provider.chunks()]))


def _whole(name: str, provider: Provider, source: HostSource) -> HostSource:
    # Too few, and a buffer's old bytes would be saved, with a hash that proves them.
    if provider.encoding is None and source.num_bytes != (size := _size(provider)):
        raise StateError(
            f"the provider of {name!r} gave {source.num_bytes} bytes; {provider.dtype} of shape "
            f"{list(provider.shape or ())} has {size}"
        )
    return source


def _size(provider: Provider) -> int:
    return prod(provider.shape or ()) * itemsize(provider.dtype)


def later(name: str, provider: Provider) -> Future[HostSource]:
    """Begin the work on a thread of its own; a daemon, as it must not keep the process from ending."""
    made: Future[HostSource] = Future()

    def work() -> None:
        try:
            made.set_result(made_source(name, provider))
        except BaseException as error:  # noqa: BLE001 - raised where the bytes are asked for
            made.set_exception(error)

    try:
        threading.Thread(target=work, name="checkpoint-serialise", daemon=True).start()
    except RuntimeError:  # the interpreter is ending, and starts no threads any more
        work()
    return made
