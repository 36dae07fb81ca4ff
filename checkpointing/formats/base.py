"""What every format is read into and written from: flat names to tensors that are read when asked for, and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import FormatError, StateError
from checkpointing.nested import Classes, flatten, unflatten

TREE = "tree"
"""Name of the value that says how a nested state (`.pt`) is built from its tensors; see checkpointing.nested."""
FILES = "hf_files."
"""Prefix of the other files of a Hugging Face folder, each as a tensor of its bytes."""
LIBRARY_KINDS = {"longrail", "deepspeed"}


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is read when asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Lazy:
        """Wrap a tensor that is there already."""
        plain = tensor.detach()
        return cls(plain.dtype, tuple(plain.shape), lambda: plain)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of any format, opened."""

    kind: str
    path: Path
    tensors: Mapping[str, Lazy]
    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""
    step: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names of tied tensors."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(lazy.shape) * lazy.dtype.itemsize for lazy in self.tensors.values())

    def only(self, pattern: str) -> Source:
        """Return the part whose names match a shell pattern (`model.*`). Raises FormatError when that is nothing."""
        tensors = {name: lazy for name, lazy in self.tensors.items() if fnmatchcase(name, pattern)}
        values = {name: value for name, value in self.values.items() if name != TREE and fnmatchcase(name, pattern)}
        aliases = {name: first for name, first in self.aliases.items() if fnmatchcase(name, pattern)}
        orphans = {name: self.tensors[first] for name, first in aliases.items() if first not in tensors}
        kept = {name: first for name, first in aliases.items() if first in tensors}
        if not tensors and not values and not orphans:
            some = ", ".join(list(self.tensors)[:3])
            raise FormatError(f"no name of {self.path} matches {pattern!r}; names are like {some}")
        return Source(self.kind, self.path, tensors | orphans, values, self.step, kept)

    def cast(self, dtype: torch.dtype) -> Source:
        """Return it with the floating-point tensors of the model in another dtype; optimizer state stays as it is."""
        model = set(model_names(self).values())

        def one(name: str, lazy: Lazy) -> Lazy:
            if name not in model or not lazy.dtype.is_floating_point:
                return lazy
            return Lazy(dtype, lazy.shape, lambda: lazy.read().to(dtype))

        tensors = {name: one(name, lazy) for name, lazy in self.tensors.items()}
        return Source(self.kind, self.path, tensors, self.values, self.step, self.aliases)

    def nested(self) -> Any:
        """Return the state as its format had it, where that was nested; else a flat dict."""
        if TREE in self.values:
            return unflatten(self.values[TREE], lambda name: self.tensors[self.aliases.get(name, name)].read())
        flat: dict[str, Any] = {name: lazy.read() for name, lazy in self.tensors.items()}
        return flat | {name: flat[first] for name, first in self.aliases.items()} | dict(self.values)


@dataclass(frozen=True, slots=True)
class Target:
    """What a writer is told."""

    path: Path
    """Does not exist yet; what is written there becomes the destination when it is whole."""
    world_size: int
    note: Callable[[str], None]
    """Is told what the user should know."""
    wrote: Callable[[int], None]
    """Is told of bytes as they are read and written."""


def of_tree(kind: str, path: Path, tree: Any, classes: Classes | None = None) -> Source:
    """Make a source of a nested state that is in memory. Raises FormatError on what cannot be a checkpoint."""
    try:
        tensors, encoded = flatten(tree, classes=classes)
    except StateError as error:
        raise FormatError(f"{path}: {error}") from error
    return Source(kind, path, {name: Lazy.of(tensor) for name, tensor in tensors.items()}, {TREE: encoded})


def model_names(source: Source) -> dict[str, str]:
    """Return {name in the model: name in the source}.

    In a training state the model's tensors stand under `model.`, beside `optim.*`; everything else is a model itself.
    """
    names = [name for name in (*source.tensors, *source.aliases) if not name.startswith(FILES)]
    training = any(name.startswith(("optim.", "optimizer.")) or name == "optim_class" for name in names) or any(
        name in ("optim_class", "optim_groups", "progress") or name.startswith("optim.") for name in source.values
    )
    if not training:
        return {name: name for name in names}
    return {name.removeprefix("model."): name for name in names if name.startswith("model.")}
