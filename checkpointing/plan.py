"""Which rank writes which tensor. Pure: specs in, a frozen plan out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpointing.dtypes import itemsize
from checkpointing.errors import StateError
from checkpointing.records import TensorSpec
from checkpointing.values import canonical

_REMEDY = "ranks that save the same name must hold the same thing; what differs needs a name with the rank in it"


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
    """Give every tensor to one rank that holds it, replicated ones so that the bytes balance.

    Raises StateError where ranks disagree on the dtype, the shape or the value of a name.
    """
    holders = _holders(ranks)
    values = _agreed_values(ranks, holders)
    aliases = _aliases(holders)
    specs = {name: next(iter(held.values())) for name, held in holders.items() if name not in aliases}
    loads = [0] * len(ranks)
    writes: list[list[TensorSpec]] = [[] for _ in ranks]
    # Tensors with one holder leave no choice and come first; then the largest first, as in any greedy balancing.
    for name in sorted(specs, key=lambda name: (len(holders[name]) > 1, -specs[name].num_bytes, name)):
        writer = min(holders[name], key=lambda rank: (loads[rank], rank))
        loads[writer] += specs[name].num_bytes
        writes[writer].append(specs[name])
    return SavePlan(tuple(tuple(file_order(specs)) for specs in writes), aliases, values)


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return the order in which tensors lie in a file, without gaps and each aligned to its elements.

    Whole pages first, so that what follows them starts on a page; then wide elements before narrow ones.
    """

    def key(spec: TensorSpec) -> tuple[bool, int, str]:
        return (spec.num_bytes % 4096 != 0, -itemsize(spec.dtype), spec.name)

    return sorted(specs, key=key)


def _holders(ranks: Sequence[RankState]) -> dict[str, dict[int, TensorSpec]]:
    holders: dict[str, dict[int, TensorSpec]] = {}
    for rank, state in enumerate(ranks):
        for spec in state.specs:
            held = holders.setdefault(spec.name, {})
            other_rank, other = next(iter(held.items()), (rank, spec))
            if (other.dtype, other.shape) != (spec.dtype, spec.shape):
                raise StateError(
                    f"tensor {spec.name!r} is {_text(other)} on rank {other_rank} and {_text(spec)} on rank {rank}; "
                    + _REMEDY
                )
            held[rank] = spec
    return holders


def _agreed_values(ranks: Sequence[RankState], tensors: Mapping[str, Mapping[int, TensorSpec]]) -> dict[str, Any]:
    agreed: dict[str, tuple[int, Any]] = {}
    for rank, state in enumerate(ranks):
        for name, value in state.values.items():
            if name in tensors:
                other_rank = next(iter(tensors[name]))
                raise StateError(f"{name!r} is a tensor on rank {other_rank} and a value on rank {rank}; {_REMEDY}")
            other_rank, other = agreed.setdefault(name, (rank, value))
            if canonical(other) != canonical(value):
                raise StateError(
                    f"value {name!r} is {_short(other)} on rank {other_rank} and {_short(value)} on rank {rank}; "
                    + _REMEDY
                )
    return {name: value for name, (_, value) in agreed.items()}


def _aliases(holders: Mapping[str, Mapping[int, TensorSpec]]) -> dict[str, str]:
    """Return second names. A name that is tied on some ranks and not on others is written for itself."""
    aliases = {}
    for name, held in holders.items():
        targets = {spec.alias_of for spec in held.values()}
        if len(targets) == 1 and (target := targets.pop()) is not None:
            aliases[name] = target
    # A target is no alias itself: the ranks that named it hold it under its first name.
    return aliases


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
