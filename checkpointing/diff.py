"""Two checkpoints of any two formats, compared by name: tensors by their numbers, values as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from checkpointing.formats import Lazy, Source, model_names
from checkpointing.values import leaves

_PART = 2**22


@dataclass(frozen=True, slots=True)
class Difference:
    """How one name differs."""

    name: str
    kind: str
    """`only in A`, `only in B`, `shape`, `dtype`, `numbers` or `value`."""
    a: Any = None
    b: Any = None
    max_abs: float | None = None
    """Largest difference; nan where one side is nan and the other is not."""
    max_rel: float | None = None
    """Largest difference over the larger of the two numbers."""
    different: int | None = None
    """Elements whose bits differ in the wider of the two dtypes."""


def compare(a: Source, b: Source, progress: Callable[[str], None] = lambda _: None) -> Iterator[Difference]:
    """Yield what differs, by name. `progress` is told of each name.

    Two sources that share no name are compared as models: a training state's `model.x` with a folder's `x`.
    """
    if not _names(a) & _names(b):
        a, b = _model(a), _model(b)
    for name in sorted(_names(a) | _names(b)):
        progress(name)
        left, right = _lazy(a, name), _lazy(b, name)
        if left is None or right is None:
            if left is not right:
                yield Difference(name, "only in B" if left is None else "only in A")
            continue
        yield from _tensors(name, left, right)
    ours, theirs = dict(leaves(a.values)), dict(leaves(b.values))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            yield Difference(name, "only in A", ours[name])
        elif name not in ours:
            yield Difference(name, "only in B", None, theirs[name])
        elif repr(ours[name]) != repr(theirs[name]):
            yield Difference(name, "value", ours[name], theirs[name])


def _tensors(name: str, left: Lazy, right: Lazy) -> Iterator[Difference]:
    if left.shape != right.shape:
        yield Difference(name, "shape", list(left.shape), list(right.shape))
        return
    kind = "numbers" if left.dtype == right.dtype else "dtype"
    found = _numbers(left.read(), right.read())
    if kind == "dtype" or found[2]:
        yield Difference(name, kind, str(left.dtype), str(right.dtype), *found)


def _numbers(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, int]:
    """Return the largest absolute and relative difference, and how many elements differ; in fp64, part by part."""
    a, b = a.reshape(-1), b.reshape(-1)
    max_abs = max_rel = 0.0
    different = 0
    for at in range(0, a.numel(), _PART):
        own, other = a[at : at + _PART], b[at : at + _PART]
        x, y = _wide(own), _wide(other)
        same = own == other if _are_integers(a, b) else (x == y) | (x.isnan() & y.isnan())
        different += int((~same).sum())
        gap = (x - y).abs().masked_fill(same, 0.0)
        scale = torch.maximum(x.abs(), y.abs())
        max_abs = _larger(max_abs, float(gap.max()))
        max_rel = _larger(max_rel, float((gap / scale).masked_fill(same, 0.0).max()))
    return max_abs, max_rel, different


def _are_integers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether both hold integers of one dtype: large ones are no exact fp64."""
    return a.dtype == b.dtype and not a.is_floating_point() and not a.is_complex()


def _larger(a: float, b: float) -> float:
    return b if b != b or b > a else a  # nan stays


def _wide(x: torch.Tensor) -> torch.Tensor:
    if x.is_complex():
        return torch.view_as_real(x).reshape(-1).double()
    return x.to(torch.float32).double() if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x.double()


def _names(source: Source) -> set[str]:
    return {*source.tensors, *source.aliases}


def _lazy(source: Source, name: str) -> Lazy | None:
    return source.tensors.get(source.aliases.get(name, name))


def _model(source: Source) -> Source:
    names: Mapping[str, str] = model_names(source)
    tensors = {name: lazy for name, own in names.items() if (lazy := _lazy(source, own)) is not None}
    return replace(source, tensors=tensors, values={}, aliases={})
