"""What of a state is copied when: the eager part inside of `save`, the rest left for the background.

small     up to SMALL_BYTES: gathered into the arena by one call a run, whatever they are
urgent    may change as soon as `save` returns: goes through the slabs before that
lazy      changes behind the fence only, as its provider says or as an optimizer that steps it shows
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from checkpointing.errors import StateError
from checkpointing.fence import Owned, Owners, local
from checkpointing.memory import no_collection
from checkpointing.plan import SMALL_BYTES, file_order
from checkpointing.providers.base import Cost, Mutability, Provider
from checkpointing.providers.composite import CompositeProvider
from checkpointing.providers.tensors import TensorProvider
from checkpointing.records import TensorSpec
from checkpointing.sources import HostSource, made_source
from checkpointing.state import FlatState, Named, State, flatten, gather
from checkpointing.values import encode

_ALIGN = 64
_PLAIN = (torch.Tensor, torch.nn.Parameter)


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
    value_places: tuple[tuple[str, int], ...]
    """Where in what the state gives out the values are."""
    provider_places: tuple[tuple[str, int], ...]
    """Where in it everything else is that is not in the arena."""

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

    def digests(self) -> dict[str, str]:
        """Return a hash of each object that is serialised already."""
        return {name: made.digest() for name, made in self.made.items() if self.providers[name].encoding}

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
            with no_collection():
                self._structure = _structure(key, named, self._owners.memory(), self._arena_limit)
        structure = self._structure
        snapshot = Snapshot(
            structure,
            {name: encode(name, named.values[at]) for name, at in structure.value_places},
            {name: _provider(named.values[at]) for name, at in structure.provider_places},
            self._take_arena(structure.arena_bytes),
        )
        for run in structure.runs:
            run.composite.gather(snapshot.arena[run.begin : run.end])
        for name, provider in snapshot.providers.items():
            if name in structure.urgent:  # copied before `save` returns, and free to change from then on
                if provider.cost is Cost.COMPUTE:
                    snapshot.made[name] = made_source(name, provider)
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
        if arena is not None and len(arena) == size:
            return arena
        return torch.zeros(size, dtype=torch.uint8, device="cpu")


def _seal(provider: Provider) -> str:
    hash_ = xxhash.xxh3_64()
    for chunk in provider.chunks():
        hash_.update(chunk)
    return hash_.hexdigest()


def _key(named: Named) -> Any:
    # Plain ints, as new containers would set off the garbage collector; and one loop, as there may be many tensors.
    where, kinds = [], []
    for value in named.values:
        if type(value) in _PLAIN and value.layout is torch.strided and not value.is_nested:
            where.append(value.data_ptr())
            # The flags matter for complex tensors: a conjugated view differs in nothing else.
            kinds.append(hash((value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg())))
        elif isinstance(value, DTensor):
            here = local(value)
            where.append(here.data_ptr())
            spread = (value.shape, value.placements, value.device_mesh)
            kinds.append(hash((here.shape, here.stride(), here.dtype, here.is_conj(), here.is_neg(), spread)))
        elif isinstance(value, TensorProvider):
            inner = _key(Named([""], [value.tensor]))
            where.append(inner[1][0])
            kinds.append(hash((inner[2][0], value.mutability, value.whole, value.at)))
        else:
            where.append(0)
            kinds.append(_kind(value))
    return named.names, where, kinds


def _kind(value: Any) -> int:
    if isinstance(value, torch.Tensor) or not isinstance(value, Provider):
        return 0
    shapes = (value.shape, value.global_shape, value.offset)
    return hash((type(value), value.mutability, value.cost, value.dtype, value.encoding, shapes))


def _structure(key: Any, named: Named, owned: Owned, arena_limit: int) -> Structure:
    flat = flatten(named)
    small = _small(flat, arena_limit)
    runs, places = _runs(flat, small)
    urgent = {name for name, one in flat.providers.items() if name not in places and _may_change(one, owned)}
    frozen = {name for name, one in flat.providers.items() if one.mutability is Mutability.NEVER}
    text = json.dumps(flat.specs)
    fingerprint = xxhash.xxh3_128_hexdigest(text.encode())
    at = {name: index for index, name in enumerate(named.names)}
    return Structure(
        key,
        fingerprint,
        flat.specs,
        runs,
        places,
        frozenset(urgent),
        frozenset(frozen),
        tuple((name, at[name]) for name in flat.values),
        tuple((name, at[name]) for name in flat.providers if name not in places),
    )


def described(fields: Sequence[Any]) -> TensorSpec:
    """Return a spec that travelled as JSON."""
    name, dtype, shape, alias, global_shape, offset, encoding = fields
    whole = (None, None) if global_shape is None else (tuple(global_shape), tuple(offset))
    return TensorSpec(name, dtype, tuple(shape), alias, *whole, encoding)


def _small(flat: FlatState, arena_limit: int) -> list[TensorSpec]:
    """Return the small tensors, the smallest first, as many as fit."""
    found, room = [], arena_limit
    for size, spec in sorted(((spec.num_bytes, spec) for spec in flat.specs), key=itemgetter(0)):
        if size > min(SMALL_BYTES, room):
            break
        one = flat.providers[spec.name]
        if size and isinstance(one, TensorProvider) and one.cost is Cost.VIEW:
            found.append(spec)
            room -= size
    return found


def _runs(flat: FlatState, small: Sequence[TensorSpec]) -> tuple[tuple[Run, ...], dict[str, tuple[int, int]]]:
    groups: dict[tuple[int, torch.device], list[tuple[TensorSpec, torch.Tensor]]] = {}
    for spec in file_order(small):
        provider = flat.providers[spec.name]
        assert isinstance(provider, TensorProvider)
        tensor = provider.local
        groups.setdefault((tensor.itemsize, tensor.device), []).append((spec, tensor))
    runs, places, at = [], {}, 0
    for group in groups.values():
        begin = at
        for spec, _ in group:
            end = at + spec.num_bytes
            places[spec.name] = (at, end)
            at = end
        runs.append(Run(CompositeProvider.of([tensor for _, tensor in group]), begin, at))
        at += -at % _ALIGN
    return tuple(runs), places


def _may_change(provider: Provider, owned: Owned) -> bool:
    if provider.mutability is not Mutability.ANYTIME:
        return False
    return not isinstance(provider, TensorProvider) or not owned.holds(provider.local)


def _provider(value: Any) -> Provider:
    one = TensorProvider(value) if isinstance(value, torch.Tensor) else value
    if type(one) is not TensorProvider or isinstance(one.tensor, DTensor):
        return one
    # Detached: memory put into the tensor from here on (`.data = ...`) is another's, and this one is kept alive.
    return replace(one, tensor=one.tensor.detach())
