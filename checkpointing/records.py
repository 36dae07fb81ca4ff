"""The words of checkpointing, as frozen values. Lengths, begins and ends are in bytes.

state       what is saved: one Stateful, or a mapping of prefix to Stateful
name        the global name of a tensor or value: `prefix.name`, or the name itself when the state is one Stateful
replicated  held under one name by several ranks: written once
alias       a second name of a tensor that shares its memory with another (tied weights): written once
slice       the box of a global tensor that one rank holds: where it begins (`offset`) and its `shape`
piece       what one hash covers: the bytes of one slice between two multiples of `piece_bytes` in the file
object      a value that is kept as bytes beside the tensors (`objects.py`), instead of as JSON in the manifest
commit      the rename that turns `step-N.tmp-*` into `step-N`: before it nothing is visible, after it everything is
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from checkpointing.dtypes import itemsize


@runtime_checkable
class Stateful(Protocol):
    """Anything with torch's two methods; both speak flat dicts of names to tensors or JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as {name: Tensor | JSON value}."""
        ...

    # Instead of `state_dict`, a save calls `state_providers()` where there is one; it may hold providers, too.

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state as `state_dict` gave it out, with every name that was saved, by whichever rank."""
        ...

    # A state with an attribute `restores_own_names = True` takes, of tensors, only names that it gives out itself, and
    # moments of its parameters: for a rank that computes with nothing else, such as a stage of a pipeline.


@lru_cache(1024)  # there may be many tensors, of few shapes
def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * itemsize(dtype)


_ORIGINS = tuple((0,) * num_dims for num_dims in range(65))  # torch has at most 64 dims


class TensorSpec(NamedTuple):
    """A tensor, or a slice of one, as a rank holds it, without its bytes."""

    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    """What this rank holds."""
    alias_of: str | None = None
    """The name under which this rank holds the very same memory; None when this is the first name of it."""
    global_shape: tuple[int, ...] | None = None
    """Shape of the whole tensor; None when this is the whole."""
    offset: tuple[int, ...] | None = None
    """Where the slice begins in the whole tensor, one number per dim; None when this is the whole."""
    encoding: str | None = None
    """Of an object, whose size shows only once it is serialised; None for tensors."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the slice; 0 of an object."""
        return 0 if self.encoding else _size(self.dtype, self.shape)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.shape if self.global_shape is None else self.global_shape

    @property
    def begin(self) -> tuple[int, ...]:
        """Where the slice begins in the whole tensor."""
        return _ORIGINS[len(self.shape)] if self.offset is None else self.offset


class TensorEntry(NamedTuple):
    """Where a tensor, or a slice of one, lies on disk.

    Several entries of one name are slices that tile the whole tensor, without a gap and without an overlap.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where the slice begins in the global tensor, one number per dim."""
    shape: tuple[int, ...]
    """Shape of the slice."""
    file: str
    begin: int
    """First byte in the file."""
    end: int
    """One past the last byte in the file."""
    hashes: tuple[str, ...]
    """xxh3-64 of each piece of the bytes begin .. end, 16 hex digits each; `piece_ranges` tells where they lie."""

    def __hash__(self) -> int:
        return hash((self.name, self.begin))  # all fields would make a load of many tensors slow


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A data file of a checkpoint."""

    path: str
    """A plain file name inside the checkpoint's folder."""
    length: int
    head_bytes: int
    """How many bytes at the beginning of the file `xxh3_64` covers: the header, or (format 1) the whole file."""
    xxh3_64: str
    """Hash of these bytes, 16 hex digits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a checkpoint holds, except the bytes of its tensors."""

    run_id: str
    step: int
    world_size: int
    piece_bytes: int
    """Pieces end at multiples of this in a file. Format 1: beyond any file, so that each tensor is one piece."""
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    """Sorted by name and offset."""
    aliases: Mapping[str, str]
    """Second names of tensors, to the name they are written under."""
    objects: Mapping[str, str]
    """Names of U8 tensors that hold an object, to its encoding (`objects.ENCODINGS`)."""
    values: Mapping[str, Any]
    """JSON values, decoded."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a manifest, what listing and retention need; quick to read however many tensors there are."""

    run_id: str
    step: int
    files: tuple[FileEntry, ...]
    values: Mapping[str, Any]
    """As they are encoded."""


@dataclass(frozen=True, slots=True)
class RestoreInfo:
    """What a restore read."""

    step: int
    path: Path
    skipped: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that did not verify, newest first, each with the reason."""


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far a save is on this rank."""

    written_bytes: int
    total_bytes: int
    done: bool
