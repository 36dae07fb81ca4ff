"""Nested states (torch's, DeepSpeed's, a Trainer's) as flat tensors and one JSON tree, and back. Nothing executes.

    {"model": {"w": T}, "step": 3, "betas": (0.9, 0.99)}
    tensors   {"model.w": T}
    tree      {"model": {"w": {"$tensor": "model.w"}}, "step": 3, "betas": {"$tuple": [0.9, 0.99]}}

A mark is a dict of one key that begins with `$`. Objects come back only as classes that the caller lists.
"""

from __future__ import annotations

import base64
import enum
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from checkpointing.errors import IntegrityError, StateError
from checkpointing.torch_dtypes import NAMES

Classes = Mapping[str, type]
"""Classes whose instances may be saved and made again, by `module.qualname`."""

_PLAIN = (str, int, float, bool, type(None))


def class_name(kind: type) -> str:
    """Return `module.qualname`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def flatten(
    tree: Any, prefix: str = "", classes: Classes | None = None, taken: Container[str] = ()
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return (tensors by name, none of them `taken`; the tree as JSON with marks).

    Raises StateError naming what cannot be saved.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _Encoder(tensors, classes or {}, taken).encode(prefix, tree)


def unflatten(tree: Any, tensor: Callable[[str], torch.Tensor], classes: Classes | None = None) -> Any:
    """Return the nested state; `tensor` gives a tensor by its name. IntegrityError if `flatten` never gave it."""
    try:
        return _decode(tree, tensor, classes or {})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise IntegrityError(
            f"a nested state is not one this library writes: {type(error).__name__}: {error}"
        ) from error


def _decode(tree: Any, tensor: Callable[[str], torch.Tensor], classes: Classes) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensor, classes) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1 and (mark := next(iter(tree))).startswith("$"):
        if mark not in _DECODERS:
            raise IntegrityError(f"unknown mark {mark!r} in a nested state; it needs a newer version of longrail")
        return _DECODERS[mark](tree[mark], tensor, classes)
    return {key: _decode(item, tensor, classes) for key, item in tree.items()}


class _Encoder:
    def __init__(self, tensors: dict[str, torch.Tensor], classes: Classes, taken: Container[str]) -> None:
        self._tensors, self._classes, self._taken = tensors, classes, taken

    def encode(self, path: str, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(path, value)}
        if type(value) in (np.ndarray, np.memmap) or isinstance(value, np.generic):
            mark = "$scalar" if isinstance(value, np.generic) else "$ndarray"
            return {mark: self._add(path, _of_numpy(path, np.asarray(value)))}
        if type(value) in (dict, OrderedDict):
            return self._dict(path, value)
        if type(value) is list:
            return self._items(path, value)
        for kind, mark in ((torch.Size, "$size"), (tuple, "$tuple")):
            if type(value) is kind:
                return {mark: self._items(path, value)}
        if isinstance(value, set | frozenset) and all(type(item) in _PLAIN for item in value):
            return {"$set": sorted(value, key=repr)}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, torch.dtype) and value in NAMES:
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, PurePath):
            return str(value)
        return self._object(path, value)

    def _items(self, path: str, values: Any) -> list[Any]:
        return [self.encode(f"{path}.{index}", item) for index, item in enumerate(values)]

    def _dict(self, path: str, value: Mapping[Any, Any]) -> Any:
        def under(key: Any) -> str:
            return f"{path}.{key}" if path else str(key)

        plain = all(type(key) is str for key in value) and not (
            len(value) == 1 and next(iter(value), "").startswith("$")
        )
        if plain and type(value) is dict:
            return {key: self.encode(under(key), item) for key, item in value.items()}
        pairs = [[self.encode(under(key), key), self.encode(under(key), item)] for key, item in value.items()]
        return {"$dict" if type(value) is dict else "$odict": pairs}

    def _object(self, path: str, value: Any) -> Any:
        name = class_name(type(value))
        if name not in self._classes:
            raise StateError(
                f"{path or 'the state'!r} is of type {name}; tensors, numbers, text, lists, tuples and dicts can be "
                "saved: give its fields instead"
            )
        if isinstance(value, enum.Enum):
            return {"$enum": [name, value.name]}
        return {"$object": [name, self.encode(path, dict(vars(value)))]}

    def _add(self, path: str, tensor: torch.Tensor) -> str:
        name, count = path or "tensor", 1
        while name in self._tensors or name in self._taken:
            count += 1
            name = f"{path}#{count}"
        self._tensors[name] = tensor
        return name


def _of_numpy(path: str, value: np.ndarray) -> torch.Tensor:
    try:  # writable, as torch wants it; without a copy where that can be
        return torch.from_numpy(np.require(value, requirements=("C", "W")))
    except (TypeError, ValueError):
        raise StateError(
            f"{path or 'the state'!r} is a numpy array of {value.dtype}, which no tensor has; make it a tensor, or "
            "a list"
        ) from None


def _known(name: Any, classes: Classes) -> type:
    if not isinstance(name, str) or name not in classes:
        raise IntegrityError(f"the state holds an object of class {name!r}, which is not one that may be made")
    return classes[name]


def _make(pair: Any, tensor: Callable[[str], torch.Tensor], classes: Classes) -> Any:
    made = object.__new__(_known(pair[0], classes))
    vars(made).update(_decode(pair[1], tensor, classes))
    return made


def _pairs(pairs: Any, tensor: Callable[[str], torch.Tensor], classes: Classes) -> list[tuple[Any, Any]]:
    return [(_decode(key, tensor, classes), _decode(item, tensor, classes)) for key, item in pairs]


def _dtype(name: Any, *_: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise IntegrityError(f"{name!r} is not a dtype")
    return found


_DECODERS: dict[str, Callable[[Any, Callable[[str], torch.Tensor], Classes], Any]] = {
    "$tensor": lambda name, tensor, _: tensor(name),
    "$ndarray": lambda name, tensor, _: tensor(name).numpy(),
    "$scalar": lambda name, tensor, _: tensor(name).numpy()[()],
    "$tuple": lambda items, tensor, classes: tuple(_decode(items, tensor, classes)),
    "$size": lambda items, *_: torch.Size(items),
    "$set": lambda items, *_: set(items),
    "$bytes": lambda text, *_: base64.b64decode(text),
    "$dtype": _dtype,
    "$dict": lambda pairs, tensor, classes: dict(_pairs(pairs, tensor, classes)),
    "$odict": lambda pairs, tensor, classes: OrderedDict(_pairs(pairs, tensor, classes)),
    "$enum": lambda pair, _, classes: _known(pair[0], classes)[pair[1]],  # pyright: ignore[reportIndexIssue]
    "$object": _make,
}
