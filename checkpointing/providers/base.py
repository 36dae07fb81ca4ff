"""What a provider declares, and the one thing it does: give its bytes, in order."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Protocol, runtime_checkable

Chunk = memoryview | bytes


class Place(Enum):
    """Where the bytes are before they are copied."""

    HOST = "host"
    DEVICE = "device"


class Mutability(Enum):
    """When the bytes may change. The engine copies them before that."""

    ANYTIME = "anytime"
    """As soon as `save` has returned: copied inside of it."""
    STEP = "step"
    """Only in a torch optimizer's `step`, or after `fence()`: copied in the background, behind the fence."""
    NEVER = "never"
    """Not while the process lives (frozen weights): as STEP, and a candidate for incremental saves."""


class Cost(Enum):
    """What it takes to get a chunk."""

    VIEW = "view"
    """Nothing: chunks are views of memory that is there."""
    COMPUTE = "compute"
    """Work (serialising, packing): done on a thread of its own, beside the bulk copies."""


@runtime_checkable
class Provider(Protocol):
    """A piece of state under one name: a tensor, a slice of one, or an object, as bytes."""

    @property
    def place(self) -> Place:
        """Where the bytes are."""
        ...

    @property
    def mutability(self) -> Mutability:
        """When they may change."""
        ...

    @property
    def cost(self) -> Cost:
        """What it takes to get them."""
        ...

    @property
    def dtype(self) -> str:
        """As safetensors writes it: F32, BF16, ...; U8 for an object."""
        ...

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of what this rank holds; None when the size shows only once the bytes are there (objects)."""
        ...

    @property
    def global_shape(self) -> tuple[int, ...] | None:
        """Shape of the whole tensor; None when this rank holds the whole."""
        ...

    @property
    def offset(self) -> tuple[int, ...] | None:
        """Where the slice begins in the whole; None when this rank holds the whole."""
        ...

    @property
    def encoding(self) -> str | None:
        """How an object is encoded (`objects.ENCODINGS`); None for tensors."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Yield the bytes, row-major and in order. Called once a save, on a thread of the engine."""
        ...
