"""Many small tensors as one: gathered by one call, instead of one call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpointing.datafile import bytes_of
from checkpointing.providers.base import Chunk, Cost, Mutability, Place
from checkpointing.torch_dtypes import NAMES

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Not every dtype has a kernel for `cat`, and tensors of several may lie side by side."""
_AS_THEY_ARE = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32}
"""Dtypes that have one: tensors of one of these alone need no integer view each."""


@dataclass(frozen=True, slots=True)
class CompositeProvider:
    """Tensors of one element size and one device, in the order their bytes lie in the file.

    Made once and kept while the structure of a state stays: then gathering thousands of tensors costs no Python.
    """

    flat: tuple[torch.Tensor, ...]
    """The tensors, one-dimensional; of several dtypes, or of a rare one, as integers of the size of their elements."""
    mutability: Mutability = Mutability.ANYTIME
    cost: Cost = Cost.COMPUTE
    global_shape: None = None
    offset: None = None
    encoding: None = None

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> CompositeProvider:
        """Make one; tensors that do not lie in row-major order cannot be viewed flat, and are not for a composite."""
        if len(dtypes := {tensor.dtype for tensor in tensors}) == 1 and dtypes <= _AS_THEY_ARE:
            # Detached: another memory that is put into a tensor later (`.data = ...`) is not what was planned.
            flat = (tensor.detach() for tensor in tensors)
            return cls(tuple(tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in flat))
        return cls(tuple(tensor.detach().view(-1).view(_INTEGERS[tensor.dtype.itemsize]) for tensor in tensors))

    @property
    def place(self) -> Place:
        """Where the tensors are."""
        return Place.HOST if self.flat[0].device.type == "cpu" else Place.DEVICE

    @property
    def dtype(self) -> str:
        """That of `flat`."""
        return NAMES[self.flat[0].dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements of all together."""
        return (sum(one.numel() for one in self.flat),)

    @torch.no_grad()
    def gather(self, into: torch.Tensor) -> None:
        """Copy everything into `into`, a host tensor of as many bytes."""
        same = into.view(self.flat[0].dtype)
        if self.flat[0].device == into.device:
            torch.cat(self.flat, out=same)
        else:
            same.copy_(torch.cat(self.flat))

    def chunks(self) -> Iterator[Chunk]:
        """Yield one chunk, gathered."""
        into = torch.empty(self.shape, dtype=self.flat[0].dtype, device="cpu")
        self.gather(into)
        yield bytes_of(into)
