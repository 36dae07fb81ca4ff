"""Which rank writes which tensor, slice or object. Pure: specs in, a frozen plan out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from checkpointing.dtypes import itemsize
from checkpointing.errors import StateError
from checkpointing.records import TensorSpec
from checkpointing.values import canonical

SMALL_BYTES = 64 * 1024
"""Tensors up to this are gathered by one call and copied inside of `save`, whatever they are."""

_REMEDY = "ranks that save the same name must hold the same thing; what differs needs a name with the rank in it"
_Key: TypeAlias = tuple[str, tuple[int, ...]]
"""A slice of a tensor: name and offset."""


@dataclass(frozen=True, slots=True)
class RankState:
    """What one rank holds: its tensors without their bytes, and its values as strict JSON."""

    specs: tuple[TensorSpec, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Who writes what."""

    writes: tuple[tuple[TensorSpec, ...], ...]
    """Per rank, in the order of the file."""
    aliases: Mapping[str, str]
    values: Mapping[str, Any]


def plan_save(ranks: Sequence[RankState]) -> SavePlan:
    """Give every tensor, or slice, to one rank that holds it, replicated ones so that the bytes balance.

    Raises StateError where ranks disagree on the dtype, the shape or the value of a name.
    """
    writes, aliases = plan_tensors([rank.specs for rank in ranks])
    names = {spec.name: index for index, rank in enumerate(ranks) for spec in reversed(rank.specs)}
    return SavePlan(writes, aliases, agreed_values([rank.values for rank in ranks], names))


def plan_tensors(ranks: Sequence[Sequence[TensorSpec]]) -> tuple[tuple[tuple[TensorSpec, ...], ...], dict[str, str]]:
    """Return what each rank writes, in the order of its file, and the aliases."""
    holders = _holders(ranks)
    aliases = _aliases(ranks)
    specs = {key: next(iter(held.values())) for key, held in holders.items() if key[0] not in aliases}
    loads = [0] * len(ranks)
    writes: list[list[TensorSpec]] = [[] for _ in ranks]
    # Slices with one holder leave no choice and come first; then the largest first, as in any greedy balancing.
    shared = [key for key in specs if len(holders[key]) > 1]
    for key, spec in specs.items():
        if len(holders[key]) == 1:
            (writer,) = holders[key]
            loads[writer] += spec.num_bytes
            writes[writer].append(spec)
    for key in sorted(shared, key=lambda key: (-specs[key].num_bytes, key)):
        writer = min(holders[key], key=lambda rank: (loads[rank], rank))
        loads[writer] += specs[key].num_bytes
        writes[writer].append(specs[key])
    return tuple(tuple(file_order(specs)) for specs in writes), aliases


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return the order in which tensors lie in a file, without gaps and each aligned to its elements.

    Whole pages first, so that what follows them starts on a page; then wide elements before narrow ones, and of these
    the small ones side by side, to be gathered together. Objects, whose size is not known yet, come last.
    """

    return sorted(specs, key=lambda spec: (_class(spec.dtype, spec.num_bytes, spec.encoding), spec.name))


@lru_cache(1024)  # there may be many tensors, of few sizes
def _class(dtype: str, size: int, encoding: str | None) -> tuple[object, ...]:
    small = size <= SMALL_BYTES
    pages = not small and size % 4096 == 0
    return (encoding is not None, not pages, -itemsize(dtype), not small, dtype)


def agreed_values(ranks: Sequence[Mapping[str, Any]], tensors: Mapping[str, int]) -> dict[str, Any]:
    """Return the values of all ranks; `tensors` are the names that are taken, and a rank that holds each."""
    agreed: dict[str, tuple[int, Any]] = {}
    for rank, values in enumerate(ranks):
        for name, value in values.items():
            if name in tensors:
                raise StateError(f"{name!r} is a tensor on rank {tensors[name]} and a value on rank {rank}; {_REMEDY}")
            other_rank, other = agreed.setdefault(name, (rank, value))
            if other is not value and canonical(other) != canonical(value):
                raise StateError(
                    f"value {name!r} is {_short(other)} on rank {other_rank} and {_short(value)} on rank {rank}; "
                    + _REMEDY
                )
    return {name: value for name, (_, value) in agreed.items()}


def _holders(ranks: Sequence[Sequence[TensorSpec]]) -> dict[_Key, dict[int, TensorSpec]]:
    """Return who holds each slice. Empty slices of a tensor that is not empty are left out."""
    first: dict[str, tuple[int, TensorSpec]] = {}
    holders: dict[_Key, dict[int, TensorSpec]] = {}
    for rank, specs in enumerate(ranks):
        for spec in specs:
            other_rank, other = first.setdefault(spec.name, (rank, spec))
            if other is not spec and _kind(spec) != _kind(other):
                raise StateError(
                    f"tensor {spec.name!r} is {_text(other)} on rank {other_rank} and {_text(spec)} on rank {rank}; "
                    + _REMEDY
                )
            if 0 not in spec.shape or 0 in spec.whole_shape:
                held = holders.setdefault((spec.name, spec.begin), {})
                other_rank, other = next(iter(held.items()), (rank, spec))
                if other.shape != spec.shape:
                    raise StateError(
                        f"the slice of {spec.name!r} at {list(spec.begin)} is {list(other.shape)} on rank {other_rank} "
                        f"and {list(spec.shape)} on rank {rank}; {_REMEDY}"
                    )
                held[rank] = spec
    return holders


def _kind(spec: TensorSpec) -> tuple[object, ...]:
    return (spec.dtype, spec.whole_shape, spec.encoding)


def _aliases(ranks: Sequence[Sequence[TensorSpec]]) -> dict[str, str]:
    """Return second names. A name that is tied on some ranks and not on others is written for itself."""
    targets: dict[str, set[str | None]] = {spec.name: set() for specs in ranks for spec in specs if spec.alias_of}
    for spec in (spec for specs in ranks if targets for spec in specs if spec.name in targets):
        targets[spec.name].add(spec.alias_of)
    # A target is no alias itself: the ranks that named it hold it under its first name.
    return {name: target for name, found in targets.items() if len(found) == 1 and (target := next(iter(found)))}


def _text(spec: TensorSpec) -> str:
    return "an object" if spec.encoding else f"{spec.dtype} {list(spec.whole_shape)}"


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
