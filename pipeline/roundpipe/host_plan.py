"""What lies where in the memory that the ranks of a node share. Pure: every rank computes the same.

words        who is how far: see `WordMap`
losses       fp64, one for every micro-batch of a run;  norms  fp64, one for every parameter; both twice
headers      shape and dtype of every activation and gradient
weights      every parameter, in as many versions as the staleness needs
gradients    of every trained parameter; of a tied one, one for each layer that uses it
activations  between slots: at each boundary of the partition, for every micro-batch; and one gradient of each
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pipeline.actions import Phase
from pipeline.errors import PlanError
from pipeline.roundpipe.layers import SlotLayer
from pipeline.schedules.roundpipe import Slots

ALIGNMENT = 64
HEADER_BYTES = 8 * 16
TEXT_BYTES = 4096
MAX_LOSSES = 2**16


class Region(NamedTuple):
    """A place in the store, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class HostParameter:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    layers: tuple[int, ...]
    """That use it, ascending; two for a tied one."""

    @property
    def home(self) -> int:
        """The layer whose version counts for it: the first, the last to have its gradient."""
        return self.layers[0]

    @property
    def nbytes(self) -> int:
        """Of one version."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WordMap:
    """Number of each word. What is counted: *turns*, optimizer steps and evaluations since the store was made."""

    ranks: int
    layers: int
    microbatches: int
    copies: int
    """Of every activation and gradient. Each has words of its own: where steps overlap, a later one may be done first.
    """

    abort = 0
    """Rank that gave up, plus 1; why is in the text."""

    def ended(self, rank: int) -> int:
        """Turn after which a rank is done with a run."""
        return 1 + rank

    def normed(self, rank: int) -> int:
        """Norms that a rank has computed."""
        return 1 + self.ranks + rank

    def version(self, layer: int) -> int:
        """First turn of the run, plus the optimizer steps that the layer's weights have had in it."""
        return 1 + 2 * self.ranks + layer

    def gradients(self, layer: int) -> int:
        """Turn and rounds whose gradients of a layer are complete, see `rounds_done`."""
        return 1 + 2 * self.ranks + self.layers + layer

    def put(self, phase: Phase, boundary: int, microbatch: int, turn: int) -> int:
        """Turn whose activation or gradient is there, of those that use the same copy as `turn`."""
        return self._boundary((Phase.F, Phase.B).index(phase), boundary, microbatch, turn)

    def taken(self, phase: Phase, boundary: int, microbatch: int, turn: int, *, again: bool) -> int:
        """Turn whose activation (`again`: for a recompute) or gradient has been fetched, as for `put`."""
        return self._boundary(4 if phase is Phase.B else 2 + again, boundary, microbatch, turn)

    def _boundary(self, kind: int, boundary: int, microbatch: int, turn: int) -> int:
        first = 1 + 2 * (self.ranks + self.layers)
        place = (kind * (self.layers + 1) + boundary) * self.microbatches + microbatch
        return first + place * self.copies + turn % self.copies

    @property
    def num(self) -> int:
        """How many there are."""
        return self._boundary(5, 0, 0, 0)


def rounds_done(turn: int, rounds: int) -> int:
    """Return what the gradient word of a layer says after so many rounds of a turn."""
    return turn << 20 | rounds


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The layout. Make it with `plan_host`."""

    ranks: int
    staleness: int
    parameters: Mapping[str, HostParameter]
    """In the order of the layers."""
    boundaries: tuple[int, ...]
    """Where an activation may be needed, ascending; boundary i lies before layer i."""
    words: WordMap
    owners: tuple[int, ...]
    """Of each layer, the rank that steps the parameters whose home it is."""
    boundary_bytes: int
    regions: dict[tuple, Region] = field(repr=False)
    size: int

    def boundary(self, kind: str, phase: Phase, boundary: int, microbatch: int, turn: int) -> Region:
        """Return where the `header` or the `boundary` of an activation or gradient lies."""
        number = boundary if phase is Phase.F else 0
        return self.regions[kind, phase, number, microbatch, turn % (1 + self.staleness)]

    def owned(self, rank: int) -> list[HostParameter]:
        """Return the parameters that a rank steps and saves."""
        return [p for p in self.parameters.values() if self.owners[p.home] == rank]

    def homes(self, rank: int) -> list[int]:
        """Return the layers whose version a rank makes."""
        return [layer for layer, owner in enumerate(self.owners) if owner == rank]


def plan_host(
    layers: Sequence[SlotLayer],
    slots: Slots,
    *,
    ranks: int,
    microbatches: int,
    boundary_bytes: int,
    staleness: int = 0,
) -> HostPlan:
    """Lay out what `ranks` processes share to run `layers` in `slots`.

    `microbatches` is the most of one optimizer step, `boundary_bytes` the most of one activation between two layers.
    The parameters must have their shapes. Raises PlanError for slots of another number of layers, and for a table
    whose parameter is another layer's object too.
    """
    if slots.num_layers != len(layers):
        raise PlanError(f"the slots hold {slots.num_layers} layers and the model has {len(layers)}")
    parameters = parameters_of(layers)
    boundaries = boundaries_of(slots)
    words = WordMap(ranks, len(layers), microbatches, 1 + staleness)
    row = _Row()
    row.add(("words",), 8 * words.num)
    row.add(("text",), TEXT_BYTES)
    row.add(("losses",), 2 * 8 * MAX_LOSSES)
    row.add(("norms",), 2 * 8 * len(parameters))
    for p in parameters.values():
        for version in range(1 + staleness if p.trained else 1):
            row.add(("weights", p.name, version), p.nbytes)
        if p.trained:
            for layer in p.layers:
                row.add(("gradient", p.name, layer), p.nbytes)
    for phase, number in [*((Phase.F, b) for b in boundaries), (Phase.B, 0)]:
        for microbatch in range(microbatches):
            for copy in range(1 + staleness):
                row.add(("header", phase, number, microbatch, copy), HEADER_BYTES)
                row.add(("boundary", phase, number, microbatch, copy), boundary_bytes)
    owners = _owners(parameters.values(), len(layers), ranks)
    return HostPlan(
        ranks, staleness, parameters, boundaries, words, owners, boundary_bytes, row.regions, row.size
    )  # fmt: skip


def parameters_of(layers: Sequence[SlotLayer]) -> dict[str, HostParameter]:
    """Return every parameter once, by name."""
    used: dict[str, list[int]] = {}
    first = {}
    for i, layer in enumerate(layers):
        for name, p in layer.parameters.items():
            used.setdefault(name, []).append(i)
            first.setdefault(name, p)
        if layer.rows is not None and len(layer.parameters) != 1:
            raise PlanError(f"{layer.name} reads rows and has {len(layer.parameters)} parameters; it can have one only")
    for i, layer in enumerate(layers):
        shared = [j for j, other in enumerate(layers) if j != i and _same_object(layer, other)]
        if layer.rows is not None and shared:
            raise PlanError(
                f"the table of {layer.name} is the very parameter of {layers[shared[0]].name}; give it one of its own"
            )
    return {
        name: HostParameter(name, tuple(first[name].shape), first[name].dtype, first[name].requires_grad, tuple(where))
        for name, where in used.items()
    }


def _same_object(layer: SlotLayer, other: SlotLayer) -> bool:
    mine = {id(p) for p in layer.parameters.values()}
    return any(id(p) in mine for p in other.parameters.values())


def boundaries_of(slots: Slots) -> tuple[int, ...]:
    """Return the layer boundaries between slots, of either direction."""
    cuts = {bound for _, layers in slots.ranges() for bound in layers}
    return tuple(sorted(cuts - {0, slots.num_layers}))


def _owners(parameters: Iterable[HostParameter], num_layers: int, ranks: int) -> tuple[int, ...]:
    """Deal the layers, heaviest first, to the rank that has least; frozen parameters weigh little."""
    weight = [0.0] * num_layers
    for p in parameters:
        weight[p.home] += p.nbytes * (1.0 if p.trained else 0.01)
    load, owners = [0.0] * ranks, [0] * num_layers
    for layer in sorted(range(num_layers), key=lambda layer: (-weight[layer], layer)):
        owners[layer] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[layer]] += weight[layer]
    return tuple(owners)


class _Row:
    """Regions one after the other."""

    def __init__(self) -> None:
        self.regions: dict[tuple, Region] = {}
        self.size = 0

    def add(self, key: tuple, size: int) -> None:
        self.regions[key] = Region(self.size, size)
        self.size += -(-size // ALIGNMENT) * ALIGNMENT
