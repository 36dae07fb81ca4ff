"""What a layer costs: t(n) = alpha + n * beta for each operation, and T(r) for r chunks.

Units: seconds, bytes of one rank's buffer (rows for experts). Source of the four cases that T(r) joins into one
formula: FSMoE, arXiv 2501.10714, section 4; the formula agrees with `moe.simulate` on every layer.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf
from sys import float_info
from typing import Any

import numpy as np

from moe.errors import PlanError
from moe.plan import COMPUTE, INTER, INTRA

MAX_CHUNKS = 16


def _require_costs(*values: float) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= float_info.max:
            raise PlanError(f"{value!r} is no cost; sizes and seconds are numbers of at least 0")


_MOST_S = 1e12
"""No layer takes 30,000 years; sums of costs below this stay finite."""


def _seconds(what: str, value: float) -> float:
    if not 0 <= value < _MOST_S:
        raise PlanError(f"{what} comes to {value:.3g} s; look at the units of the profile and of the load")
    return value


@dataclass(frozen=True, slots=True)
class Line:
    """alpha + n * beta; nothing to do costs nothing."""

    alpha_s: float
    beta_s: float

    def __post_init__(self) -> None:
        _require_costs(self.alpha_s, self.beta_s)

    def __call__(self, n: float) -> float:
        """Return the seconds of `n` bytes or rows."""
        return self.alpha_s + n * self.beta_s if n > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Table:
    """Measured points, sizes ascending and times not falling; straight between them, last slope beyond."""

    sizes: tuple[float, ...]
    times_s: tuple[float, ...]

    def __post_init__(self) -> None:
        _require_costs(*self.sizes, *self.times_s)
        ascending = all(a < b for a, b in pairwise(self.sizes)) and all(a <= b for a, b in pairwise(self.times_s))
        if not self.sizes or len(self.sizes) != len(self.times_s) or not ascending:
            raise PlanError(f"sizes {self.sizes} and times {self.times_s} are no table: as many of both, ascending")

    def __call__(self, n: float) -> float:
        """Return the seconds of `n` bytes or rows."""
        if n <= 0:
            return 0.0
        if n <= self.sizes[0] or len(self.sizes) == 1:
            return self.times_s[0]
        right = min(bisect_left(self.sizes, n), len(self.sizes) - 1)
        n0, n1 = self.sizes[right - 1], self.sizes[right]
        t0, t1 = self.times_s[right - 1], self.times_s[right]
        return t0 + (n - n0) * (t1 - t0) / (n1 - n0)


Cost = Line | Table
FREE = Line(0.0, 0.0)
OPERATIONS = (
    "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "expert_forward", "expert_backward", "piece_forward",
    "piece_backward",
)  # fmt: skip
_MOST_SLOWDOWN = 1e6
PAIRS = ((INTER, INTRA), (COMPUTE, INTER), (COMPUTE, INTRA))


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The cost of every operation of a layer, measured on the groups that will run it."""

    all_to_all: Cost
    all_gather: Cost = FREE
    reduce_scatter: Cost = FREE
    all_reduce: Cost = FREE
    expert_forward: Cost
    expert_backward: Cost
    """Includes the recomputation, if there is any."""
    piece_forward: Cost = FREE
    """What the executor itself adds to a piece of the experts' work, by the bytes of its rows: taking them, keeping a
    graph, putting them back. This and the next two come from `moe.calibrate`."""
    piece_backward: Cost = FREE
    layer_s: float = 0.0
    """What it adds to a layer in each direction, whatever the chunks."""
    slowdowns: Mapping[str, float] = field(default_factory=dict)
    """`inter+intra` and so on: how much longer each of the two takes while both run; 1 when absent."""
    residuals: Mapping[str, float] = field(default_factory=dict)
    """Largest relative residual of each fit; an operation with a table shows what its line would have had."""

    def __post_init__(self) -> None:
        if not 0 <= self.layer_s < _MOST_S:
            raise PlanError(f"layer_s is {self.layer_s!r}; give seconds of at least 0")
        known = {"+".join(pair) for pair in PAIRS}
        for name, value in self.slowdowns.items():
            if name not in known or not 1.0 <= value <= _MOST_SLOWDOWN:
                raise PlanError(
                    f"slowdown {name!r} is {value!r}; give a factor of at least 1, and at most {_MOST_SLOWDOWN:g}, for "
                    f"{sorted(known)}"
                )
        _require_costs(*self.residuals.values())

    def slowdown(self, one: str, other: str) -> float:
        """Return how much longer lanes `one` and `other` take together."""
        return self.slowdowns.get("+".join(sorted((one, other))), 1.0)

    def describe(self) -> list[str]:
        """Return what was measured in words, a line an operation, and why a table stands where no line fits."""
        lines = [_words(name, getattr(self, name), self.residuals.get(name)) for name in OPERATIONS]
        lines = [line for line, name in zip(lines, OPERATIONS, strict=True) if getattr(self, name) != FREE]
        lines.append(f"the executor itself: {self.layer_s * 1e3:.3f} ms a layer and direction, beside the pieces")
        return lines + [f"{pair} together: {factor:.2f}x" for pair, factor in self.slowdowns.items()]

    def to_json(self) -> str:
        """Write the profile as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Read what `to_json` wrote; raises PlanError for anything else."""
        try:
            values = json.loads(text)
            costs = {name: _cost(values.pop(name)) for name in OPERATIONS}
            return cls(**costs, **values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(f"not a profile: {error!r}; make one with `python -m moe profile`") from None


def _words(name: str, cost: Cost, residual: float | None) -> str:
    if isinstance(cost, Table):
        why = "" if residual is None else f", for a line would be off by {residual:.0%}"
        return f"{name}: a table of {len(cost.sizes)} sizes{why}"
    count, unit = (1e3, "for 1000 rows") if name.startswith("expert") else (1e6, "a MB")
    off = "" if residual is None else f", off by {residual:.0%} at most"
    return f"{name}: {cost.alpha_s * 1e3:.3f} ms and {cost.beta_s * count * 1e3:.3f} ms {unit}{off}"


def _cost(values: dict[str, Any]) -> Cost:
    if "sizes" in values:
        return Table(tuple(values["sizes"]), tuple(values["times_s"]))
    return Line(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """What one layer moves and computes on its busiest rank, in one direction, all chunks together."""

    exchange_bytes: float
    """Buffer of the all-to-all, as if split evenly: see `busiest_bytes`."""
    gather_bytes: float = 0.0
    """What all-gather puts out, and reduce-scatter takes in, over the expert-sharding group; 0 without ESP."""
    expert_rows: float
    gradient_bytes: float = 0.0
    """Dense gradients that are ready by this layer's backward and belong to its plan."""
    slice_bytes: float = 1 << 20
    """They go in slices of this size, each an all-reduce of its own."""

    def __post_init__(self) -> None:
        for name in ("exchange_bytes", "gather_bytes", "expert_rows", "gradient_bytes"):
            if not 0 <= getattr(self, name) < inf:
                raise PlanError(f"{name} is {getattr(self, name)!r}; a load is a number of at least 0")
        if not 0 < self.slice_bytes < inf:
            raise PlanError(f"slice_bytes is {self.slice_bytes!r}; a slice has more than no bytes")

    @property
    def held_bytes(self) -> float:
        """Rows that the busiest rank computes on, in bytes."""
        return self.gather_bytes or self.exchange_bytes


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one chunk in each stage, and of the gradients (once). Arrays do as well as floats."""

    all_to_all: Any
    gather: Any
    expert: Any
    scatter: Any
    gradient: Any = 0.0


def gradient_time(profile: Profile, load: LayerLoad) -> float:
    """Return the seconds of the load's gradients, slice by slice."""
    whole, rest = divmod(load.gradient_bytes, load.slice_bytes)
    return _seconds("the gradient", whole * profile.all_reduce(load.slice_bytes) + profile.all_reduce(rest))


def stage_times(
    profile: Profile, load: LayerLoad, chunks: int, *, backward: bool, pieces: int | None = None
) -> StageTimes:
    """Return what one of `chunks` chunks takes; gradients count in backward only.

    `pieces` are those of the layer (`LayerPlan.pieces`), in which the experts run; without it as many as chunks.
    """
    pieces = pieces or chunks
    expert = profile.expert_backward if backward else profile.expert_forward
    extra = profile.piece_backward if backward else profile.piece_forward
    return StageTimes(
        all_to_all=_seconds("an all-to-all", profile.all_to_all(load.exchange_bytes / chunks)),
        gather=_seconds("a gather", profile.all_gather(load.gather_bytes / chunks)),
        expert=_seconds(
            "a chunk of the experts",
            (expert(load.expert_rows / pieces) + extra(load.held_bytes / pieces)) * pieces / chunks,
        ),
        scatter=_seconds("a scatter", profile.reduce_scatter(load.gather_bytes / chunks)),
        gradient=gradient_time(profile, load) if backward else 0.0,
    )


def layer_time(t: StageTimes, chunks: int) -> Any:
    """Return T(r) of the fifo order: the longest of the inter-node lane, the pipeline, and the intra-node lane."""
    a, g, e, s = t.all_to_all, t.gather, t.expert, t.scatter
    slowest = np.maximum(np.maximum(a, g), np.maximum(e, s))
    inter = 2 * chunks * a + t.gradient
    through = 2 * a + g + e + s + (chunks - 1) * slowest
    intra = 2 * a + g + s + (chunks - 1) * (np.maximum(a, g) + np.maximum(a, s))
    return np.maximum(np.maximum(inter, through), intra)


def lane_bound(profile: Profile, load: LayerLoad, *, backward: bool, max_chunks: int = MAX_CHUNKS) -> float:
    """Return what no plan of up to `max_chunks` beats: the busiest of compute, inter and intra, each cut as it likes.

    By lines one chunk takes least; by a table of measured points many small ones may.
    """
    most = 2 * max_chunks - 1  # pieces, where the two directions have borders of their own
    every = [(n, stage_times(profile, load, n, backward=backward)) for n in range(1, most + 1)]
    compute = min(n * t.expert for n, t in every)
    inter = min(2 * n * t.all_to_all for n, t in every) + every[0][1].gradient
    return max(compute, inter, min(n * (t.gather + t.scatter) for n, t in every))


def serial_time(profile: Profile, load: LayerLoad, *, backward: bool) -> float:
    """Return the time of one chunk with nothing overlapped, gradients afterwards."""
    t = stage_times(profile, load, 1, backward=backward)
    return profile.layer_s + 2 * t.all_to_all + t.gather + t.expert + t.scatter + t.gradient


def busiest_bytes(bytes_SR: Sequence[Sequence[float]]) -> float:
    """Return the evenly split buffer that loads the link as much as these real splits do.

    `bytes_SR[s][r]` goes from rank s to rank r. What a rank keeps crosses no link; of an even buffer of n bytes,
    (W-1)/W cross it, so the busiest direction of the busiest rank times W/(W-1) is the same load.
    """
    size = len(bytes_SR)
    if any(len(row) != size for row in bytes_SR):
        raise PlanError(f"splits are {[len(row) for row in bytes_SR]} wide for {size} ranks; give a square table")
    if size < 2:
        return 0.0
    sent = (sum(row) - row[i] for i, row in enumerate(bytes_SR))
    received = (sum(row[i] for row in bytes_SR) - bytes_SR[i][i] for i in range(size))
    return max(*sent, *received) * size / (size - 1)
