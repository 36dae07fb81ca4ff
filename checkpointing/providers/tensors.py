"""Tensors and slices of tensors, without a copy where memory allows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Partial

from checkpointing.datafile import bytes_of
from checkpointing.errors import StateError
from checkpointing.providers.base import Chunk, Cost, Mutability, Place
from checkpointing.torch_dtypes import NAMES


@dataclass(frozen=True, slots=True)
class TensorProvider:
    """A tensor, or a DTensor of which this rank gives its slice.

    `mutability` is a promise of the caller's; the default promises nothing, and costs a copy inside `save`, unless the
    engine has seen by itself that the tensor belongs to an optimizer that steps. A plain tensor that is this rank's
    slice of a larger one (tensor-, pipeline- or expert-parallel) says so by `whole` and `at`.
    """

    tensor: torch.Tensor
    mutability: Mutability = Mutability.ANYTIME
    whole: tuple[int, ...] | None = None
    """Shape of the tensor that a plain tensor is a slice of."""
    at: tuple[int, ...] | None = None
    """Where in it the slice begins, one number per dim."""

    @property
    def local(self) -> torch.Tensor:
        """What this rank holds, as a plain tensor."""
        return self.tensor._local_tensor if type(self.tensor) is DTensor else self.tensor

    @property
    def place(self) -> Place:
        """Where the tensor is."""
        return Place.HOST if self.local.device.type == "cpu" else Place.DEVICE

    @property
    def cost(self) -> Cost:
        """Nothing, unless the elements do not lie in row-major order."""
        tensor = self.local
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        return Cost.VIEW if plain else Cost.COMPUTE

    @property
    def dtype(self) -> str:
        """As safetensors writes it."""
        return NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what this rank holds."""
        return tuple(self.local.shape)

    @property
    def global_shape(self) -> tuple[int, ...] | None:
        """Shape of a DTensor, or of what this is a slice of."""
        return tuple(self.tensor.shape) if type(self.tensor) is DTensor else self.whole

    @property
    def offset(self) -> tuple[int, ...] | None:
        """Where the slice begins."""
        return slice_of("a DTensor", self.tensor) if type(self.tensor) is DTensor else self.at

    @property
    def encoding(self) -> str | None:
        """A tensor is no object."""
        return None

    def chunks(self) -> Iterator[Chunk]:
        """Yield one chunk: a view of the memory where that is possible."""
        yield bytes_of(self.local)


def slice_of(name: str, tensor: DTensor) -> tuple[int, ...]:
    """Return where this rank's slice begins. Raises StateError when what it holds is not one slice of the whole."""
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise StateError(f"{name!r} is a DTensor with a Partial placement, a sum not yet made; redistribute it first")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(tensor._local_tensor.shape):
        raise StateError(
            f"{name!r} is a DTensor whose local shape is {list(tensor._local_tensor.shape)} and, by its placements "
            f"{tensor.placements}, should be {list(shape)}; redistribute it to plain Shard or Replicate"
        )
    return tuple(offset)
