"""What of a state is copied when: the eager part inside of `save`, the rest left for the background.

small     up to SMALL_BYTES: gathered into the arena by one call a run, whatever they are
urgent    may change as soon as `save` returns: goes through the slabs before that
lazy      changes behind the fence only, as its provider says or as an optimizer that steps it shows
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import xxhash

from checkpointing.dtypes import itemsize
from checkpointing.errors import StateError
from checkpointing.fence import Owners, local
from checkpointing.plan import SMALL_BYTES, file_order
from checkpointing.providers.base import Cost, Mutability, Provider
from checkpointing.providers.composite import CompositeProvider
from checkpointing.providers.tensors import TensorProvider
from checkpointing.records import TensorSpec
from checkpointing.sources import HostSource, made_source
from checkpointing.state import FlatState, Named, State, encoded_values, flatten, gather

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Small tensors of one element size and device, side by side in the arena."""

    composite: CompositeProvider
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What stays the same from save to save while names, shapes and memory do; made once."""

    key: Any
    fingerprint: str
    """Of the specs alone; equal on two saves whose tensors differ only in where they lie."""
    specs: tuple[TensorSpec, ...]
    runs: tuple[Run, ...]
    arena_places: dict[str, tuple[int, int]]
    """(begin, end) in the arena of each small tensor."""
    urgent: frozenset[str]
    frozen: frozenset[str]

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena."""
        return self.runs[-1].end if self.runs else 0


@dataclass(slots=True)
class Snapshot:
    """A state at the moment of a save: what is copied already, and what is still in live memory."""

    structure: Structure
    values: dict[str, Any]
    providers: dict[str, Provider]
    """Of everything that is not in the arena or made."""
    arena: torch.Tensor
    """uint8 [arena bytes]."""
    made: dict[str, HostSource] = field(default_factory=dict)
    """What had to be serialised or packed before `save` returns."""
    seals: dict[str, str] = field(default_factory=dict)
    """Hashes of what is copied late, where that is checked."""

    def check(self) -> None:
        """Raise StateError naming what changed between `save` and now, when nothing reads live memory any more."""
        changed = [name for name, seal in self.seals.items() if _seal(self.providers[name]) != seal]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise StateError(
                f"{', '.join(map(repr, changed[:3]))}{more} changed while being saved, outside of an optimizer's step; "
                "call fence() before changing it, or give it as a TensorProvider with Mutability.ANYTIME"
            )


class Snapshotter:
    """Takes snapshots; keeps the structure of the last one, and its arena."""

    def __init__(self, owners: Owners, arena_limit: int, *, check: bool) -> None:
        self._owners, self._arena_limit, self._check = owners, arena_limit, check
        self._structure: Structure | None = None
        self._arena: torch.Tensor | None = None

    def take(self, state: State) -> Snapshot:
        """Call the `state_dict()`s and copy what is small. Raises StateError, and what a `state_dict` raises."""
        named = gather(state)
        key = (_key(named), self._owners.epoch())
        if self._structure is None or self._structure.key != key:
            flat = flatten(named)
            self._structure = _structure(key, flat, self._owners.storages(), self._arena_limit)
            values = dict(flat.values)
        else:
            values = encoded_values(named)
        structure = self._structure
        snapshot = Snapshot(structure, values, _providers(named, structure), self._take_arena(structure.arena_bytes))
        for run in structure.runs:
            run.composite.gather(snapshot.arena[run.begin : run.end])
        for name, provider in snapshot.providers.items():
            if name in structure.urgent and provider.cost is Cost.COMPUTE:
                snapshot.made[name] = made_source(provider)
            elif self._check and provider.cost is Cost.VIEW:
                snapshot.seals[name] = _seal(provider)
        return snapshot

    def give_back(self, snapshot: Snapshot) -> None:
        """Let the next snapshot use the arena of this one, and let go of live memory."""
        self._arena = snapshot.arena
        snapshot.providers, snapshot.made = {}, {}

    def forget(self) -> None:
        """Let go of everything."""
        self._structure = self._arena = None

    def _take_arena(self, size: int) -> torch.Tensor:
        arena, self._arena = self._arena, None
        # A save that was given up may still read the last one; then there is none, and it gets its own.
        return arena if arena is not None and len(arena) == size else torch.zeros(size, dtype=torch.uint8)


def _seal(provider: Provider) -> str:
    hash_ = xxhash.xxh3_64()
    for chunk in provider.chunks():
        hash_.update(chunk)
    return hash_.hexdigest()


def _key(named: Named) -> list[Any]:
    return [_key_of(name, value) for name, value in named]


def _key_of(name: str, value: Any) -> Any:
    if isinstance(value, TensorProvider):
        return (name, value.mutability, _key_of(name, value.tensor))
    if isinstance(value, torch.Tensor):
        here = local(value)
        if here.layout is not torch.strided:  # about to be refused
            return (name, here.layout)
        # The flags matter for complex tensors: a conjugated view differs in nothing else.
        key = (name, here.data_ptr(), here.shape, here.stride(), here.dtype, here.is_conj(), here.is_neg())
        return key if here is value else (key, value.shape, getattr(value, "placements", None))
    if isinstance(value, Provider):
        shapes = (value.shape, value.global_shape, value.offset)
        return (name, type(value), value.mutability, value.cost, value.dtype, value.encoding, shapes)
    return name


def _structure(key: Any, flat: FlatState, owned: set[int], arena_limit: int) -> Structure:
    small = _small(flat, arena_limit)
    runs, places = _runs(flat, small)
    urgent = {name for name, one in flat.providers.items() if name not in places and _may_change(one, owned)}
    frozen = {name for name, one in flat.providers.items() if one.mutability is Mutability.NEVER}
    text = json.dumps([describe(spec) for spec in flat.specs])
    fingerprint = xxhash.xxh3_128_hexdigest(text.encode())
    return Structure(key, fingerprint, flat.specs, runs, places, frozenset(urgent), frozenset(frozen))


def describe(spec: TensorSpec) -> list[Any]:
    """Return a spec as it travels."""
    return [spec.name, spec.dtype, spec.shape, spec.alias_of, spec.global_shape, spec.offset, spec.encoding]


def described(fields: Sequence[Any]) -> TensorSpec:
    """Return the spec that `describe` was given."""
    name, dtype, shape, alias, global_shape, offset, encoding = fields
    whole = (None, None) if global_shape is None else (tuple(global_shape), tuple(offset))
    return TensorSpec(name, dtype, tuple(shape), alias, *whole, encoding)


def _small(flat: FlatState, arena_limit: int) -> list[TensorSpec]:
    """Return the small tensors, the smallest first, as many as fit."""
    found, room = [], arena_limit
    for spec in sorted(flat.specs, key=lambda spec: spec.num_bytes):
        one = flat.providers[spec.name]
        if spec.num_bytes > min(SMALL_BYTES, room):
            break
        if spec.num_bytes and isinstance(one, TensorProvider) and one.cost is Cost.VIEW:
            found.append(spec)
            room -= spec.num_bytes
    return found


def _runs(flat: FlatState, small: Sequence[TensorSpec]) -> tuple[tuple[Run, ...], dict[str, tuple[int, int]]]:
    def group(spec: TensorSpec) -> tuple[int, str]:
        return (itemsize(spec.dtype), str(_tensor(flat, spec).device))

    runs, places, at = [], {}, 0
    for _, specs in groupby(sorted(file_order(small), key=group), key=group):
        run, begin = list(specs), at
        for spec in run:
            places[spec.name] = (at, at + spec.num_bytes)
            at += spec.num_bytes
        runs.append(Run(CompositeProvider.of([_tensor(flat, spec) for spec in run]), begin, at))
        at += -at % _ALIGN
    return tuple(runs), places


def _tensor(flat: FlatState, spec: TensorSpec) -> torch.Tensor:
    provider = flat.providers[spec.name]
    assert isinstance(provider, TensorProvider)
    return provider.local


def _may_change(provider: Provider, owned: set[int]) -> bool:
    if provider.mutability is not Mutability.ANYTIME:
        return False
    return not isinstance(provider, TensorProvider) or provider.local.untyped_storage().data_ptr() not in owned


def _providers(named: Named, structure: Structure) -> dict[str, Provider]:
    found: dict[str, Provider] = {}
    for name, value in named:
        if name not in structure.arena_places:
            if isinstance(value, torch.Tensor):
                found[name] = TensorProvider(value)
            elif isinstance(value, Provider):
                found[name] = value
    return found
