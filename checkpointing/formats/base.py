"""What every format is read into and written from: flat names to tensors that are read when asked for, and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import FormatError, IntegrityError, StateError
from checkpointing.nested import Classes, flatten, unflatten
from checkpointing.values import TREE, TREES

FILES = "hf_files."
"""Prefix of the other files of a Hugging Face folder, each as a tensor of its bytes."""
_OPTIMIZER = re.compile(r"((?:.*?\.)?)(?:optim(?:izer)?\.|(?:optim_class|optim_groups|progress|deepspeed)$)")


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
    part_of: tuple[str, ...] = ()
    """Of a part: the prefixes of the training states in the whole."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(lazy.shape) * lazy.dtype.itemsize for lazy in self.tensors.values())

    def only(self, pattern: str) -> Source:
        """Return the part whose names match a shell pattern (`model.*`). Raises FormatError when that is nothing."""
        tensors = {name: lazy for name, lazy in self.tensors.items() if fnmatchcase(name, pattern)}
        values = {
            name: value
            for name, value in self.values.items()
            if (self._has_all(name, tensors, pattern) if name.startswith(TREES) else fnmatchcase(name, pattern))
            and name != TREE
        }
        aliases = {name: first for name, first in self.aliases.items() if fnmatchcase(name, pattern)}
        orphans = {name: self.tensors[first] for name, first in aliases.items() if first not in tensors}
        kept = {name: first for name, first in aliases.items() if first in tensors}
        if not tensors and not values and not orphans:
            some = ", ".join(list(self.tensors)[:3])
            raise FormatError(f"no name of {self.path} matches {pattern!r}; names are like {some}")
        return Source(self.kind, self.path, tensors | orphans, values, self.step, kept, tuple(training_states(self)))

    def _has_all(self, tree: str, kept: Mapping[str, Lazy], pattern: str) -> bool:
        """Return whether a pattern takes all of a part of the state: a tree cannot lack a tensor of its own."""
        start = f"{tree.removeprefix(TREES)}."
        inner = [name for name in (*self.tensors, *self.aliases) if name.startswith(start)]
        return all(name in kept for name in inner) if inner else fnmatchcase(start, pattern)

    def below(self, prefix: str) -> Source:
        """Return what stands under a prefix, without it."""

        def cut(names: Mapping[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(prefix): one for name, one in names.items() if name.startswith(prefix)}

        tied = cut(self.aliases)
        aliases = {name: first.removeprefix(prefix) for name, first in tied.items() if first.startswith(prefix)}
        tensors = cut(self.tensors) | {name: self.tensors[tied[name]] for name in tied.keys() - aliases.keys()}
        return Source(self.kind, self.path, tensors, cut(self.values), self.step, aliases)

    def cast(self, dtype: torch.dtype) -> Source:
        """Return it with the floating-point tensors of the model in another dtype; optimizer state stays as it is."""
        model = set(model_names(self).values())

        def one(name: str, lazy: Lazy) -> Lazy:
            if name not in model or not lazy.dtype.is_floating_point:
                return lazy
            return Lazy(dtype, lazy.shape, lambda: lazy.read().to(dtype))

        tensors = {name: one(name, lazy) for name, lazy in self.tensors.items()}
        return replace(self, tensors=tensors)

    def nested(self) -> Any:
        """Return the state as its format had it, where that was nested; else a flat dict."""
        if TREE in self.values:
            return unflatten(self.values[TREE], lambda name: self.tensors[self.aliases.get(name, name)].read())
        flat: dict[str, Any] = {name: lazy.read() for name, lazy in self.tensors.items()}
        flat |= {name: flat[first] for name, first in self.aliases.items()}
        trees = {name.removeprefix(TREES): tree for name, tree in self.values.items() if name.startswith(TREES)}
        parts = {key: unflatten(tree, flat.__getitem__) for key, tree in trees.items()}
        starts = tuple(f"{key}." for key in trees)
        rest = flat | {name: _plain(value, flat) for name, value in self.values.items() if not name.startswith(TREES)}
        return {name: value for name, value in rest.items() if not name.startswith(starts)} | parts


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
        tensors, encoded = flatten(tree, classes=classes, taken=(TREE,))
    except StateError as error:
        raise FormatError(f"{path}: {error}") from error
    return Source(kind, path, {name: Lazy.of(tensor) for name, tensor in tensors.items()}, {TREE: encoded})


def _plain(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    try:
        return unflatten(value, tensors.__getitem__)
    except IntegrityError:
        return value  # a mark of the user's own


def model_names(source: Source) -> dict[str, str]:
    """Return {name in the model: name in the source}.

    In a training state the model's tensors stand under `model.`, beside `optim.*`, all of them perhaps under a prefix;
    everything else is a model itself. Raises FormatError when there are several training states.
    """
    names = [name for name in (*source.tensors, *source.aliases) if not name.startswith(FILES)]
    states = training_states(source)
    if not states:
        return {name: name for name in names}
    start = f"{only_state(source)}model."
    return {name.removeprefix(start): name for name in names if name.startswith(start)}


def training_states(source: Source) -> list[str]:
    """Return the prefixes, with their dots, of the training states in a checkpoint: what has an optimizer and a model.

    An optimizer without a prefix and without a model is one, too: of a part, in which there is no model to be found.
    """
    parts = (f"{name.removeprefix(TREES)}." for name in source.values if name.startswith(TREES))
    names = (*source.tensors, *source.aliases, *source.values, *parts)
    found = sorted({*source.part_of, *(match[1] for name in names if (match := _OPTIMIZER.match(name)))})
    return [one for one in found if not one or any(name.startswith(f"{one}model.") for name in names)]


def only_state(source: Source) -> str:
    """Return the prefix of the training state, "" when there is none. Raises FormatError when there are several."""
    states = training_states(source)
    if len(states) > 1:
        some = " or ".join(f"--only '{one}*'" for one in states)
        raise FormatError(f"{source.path} holds {len(states)} training states; choose one of them: {some}")
    return states[0] if states else ""
