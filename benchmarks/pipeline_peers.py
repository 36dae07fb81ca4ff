"""What `benchmarks.pipeline` compares with: 1F1B and interleaved 1F1B at their best contiguous split, simulated.

Every stage recomputes its activations; or, with `keep_last`, all but the last, whose backward follows its forward at
once: what it keeps it would otherwise make again at that moment, so its memory is the same. Splits are tried one by one
where there are few, and else improved layer by layer from balanced ones until no border is better elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import comb

from pipeline import graph as graphs
from pipeline.actions import Op
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PipelineError
from pipeline.graph import Why
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import balanced_stages, with_recompute
from pipeline.simulate import simulate

Bounds = tuple[tuple[int, int], ...]

FEW_SPLITS = 20_000
MOST_STAGES_PER_DEVICE = 6


@dataclass(frozen=True, slots=True)
class Peer:
    """One schedule at its best split."""

    name: str
    schedule: Schedule
    """Complete, with recomputation."""
    makespan_s: float
    """Simulated."""
    peak_bytes: int
    """Of the device that needs most, simulated; 0 where the costs say nothing of bytes."""
    exhaustive: bool
    """Whether every split was tried."""

    @property
    def bounds(self) -> Bounds:
        """First layer, and one past the last, of every stage."""
        return self.schedule.stages


class FixedOrder:
    """The longest path through a weight-bound schedule, for any split of the layers: its order does not change."""

    def __init__(self, schedule: Schedule) -> None:
        graph = graphs.build(schedule)
        number, self._rows = {}, []
        for i in _topological([[j for j, _ in edges] for edges in graph.before]):
            number[i] = len(self._rows)
            action, edges = graph.listing.actions[i], graph.before[i]
            near = tuple(number[j] for j, why in edges if why is not Why.HOP)
            far = tuple(number[j] for j, why in edges if why is Why.HOP)
            self._rows.append((action.op is Op.B, action.stage, near, far))

    def makespan_s(
        self, bounds: Bounds, forward_sums: Sequence[float], backward_sums: Sequence[float], hop_s: float
    ) -> float:
        """Return seconds; the sums are over the first 0, 1, .. layers."""
        seconds = [[sums[hi] - sums[lo] for lo, hi in bounds] for sums in (forward_sums, backward_sums)]
        ends: list[float] = []
        for is_backward, stage, near, far in self._rows:
            start = 0.0
            for j in near:
                if ends[j] > start:
                    start = ends[j]
            for j in far:
                if ends[j] + hop_s > start:
                    start = ends[j] + hop_s
            ends.append(start + seconds[is_backward][stage])
        return max(ends)


def _topological(before: Sequence[Sequence[int]]) -> Iterator[int]:
    after: list[list[int]] = [[] for _ in before]
    for i, edges in enumerate(before):
        for j in edges:
            after[j].append(i)
    left = [len(edges) for edges in before]
    ready = [i for i, n in enumerate(left) if not n]
    for i in ready:  # grows while it is walked
        yield i
        for k in after[i]:
            left[k] -= 1
            if not left[k]:
                ready.append(k)


def best_peer(name: str, costs: Costs, *, devices: int, microbatches: int, stages: int, keep_last: bool) -> Peer:
    """Return a schedule at its best split. Raises PipelineError where it cannot be made."""
    more = {"stages_per_device": stages // devices} if name == "interleaved" else {}
    schedule = SCHEDULES[name](devices=devices, microbatches=microbatches, **more)
    schedule = with_recompute(schedule, keep_last_stage=keep_last)
    order, num = FixedOrder(schedule), costs.num_layers
    forward_sums, backward_sums = _running(costs.forward_s[0]), _running(costs.backward_s[0])
    known: dict[Bounds, float] = {}

    def seconds(bounds: Bounds) -> float:
        if bounds not in known:
            known[bounds] = order.makespan_s(bounds, forward_sums, backward_sums, costs.between_s(0))
        return known[bounds]

    few = comb(num - 1, stages - 1) <= FEW_SPLITS
    best = min(_every_split(num, stages), key=seconds) if few else _improved(_starts(costs, stages), seconds)
    found = complete(replace(schedule, stages=best))
    result = simulate(found, costs)
    return Peer(name, found, result.makespan_s, int(max(result.peak_bytes)), few)


def best_peers(
    costs: Costs, *, devices: int, microbatches: int, keep_last: bool, most: int = MOST_STAGES_PER_DEVICE
) -> list[Peer]:
    """Return 1F1B, and interleaved 1F1B with 2 to `most` stages a device, the fastest first."""
    counts = [("1f1b", devices)]
    counts += [("interleaved", devices * v) for v in range(2, min(most, costs.num_layers // devices) + 1)]
    found = []
    for name, stages in counts:
        try:
            peer = best_peer(
                name, costs, devices=devices, microbatches=microbatches, stages=stages, keep_last=keep_last
            )
            found.append(peer)
        except PipelineError:  # a number of micro-batches that it does not take
            continue
    return sorted(found, key=lambda peer: peer.makespan_s)


def _running(row: Sequence[float]) -> list[float]:
    sums = [0.0]
    for t in row:
        sums.append(sums[-1] + t)
    return sums


def _every_split(layers: int, stages: int) -> Iterator[Bounds]:
    for borders in combinations(range(1, layers), stages - 1):
        yield tuple(pairwise((0, *borders, layers)))


def _starts(costs: Costs, stages: int) -> Iterator[Bounds]:
    """Yield balanced splits, for each number of layers in the last stage, which may recompute nothing."""
    layer_s = [2 * f + b for f, b in zip(costs.forward_s[0], costs.backward_s[0], strict=True)]
    num = costs.num_layers
    for last in range(1, num - stages + 2):
        head = balanced_stages(layer_s[: num - last], stages - 1)
        yield (*head, (num - last, num))
        if sum(layer_s[num - last :]) > 2 * sum(layer_s) / stages:
            return


def _improved(starts: Iterable[Bounds], seconds: Callable[[Bounds], float]) -> Bounds:
    """Move one border at a time by one layer, as long as that is better, from the best start."""
    best = min(starts, key=seconds)
    while True:
        better = min(_neighbours(best), key=seconds, default=best)
        if seconds(better) >= seconds(best):
            return best
        best = better


def _neighbours(bounds: Bounds) -> Iterator[Bounds]:
    borders = [lo for lo, _ in bounds] + [bounds[-1][1]]
    for i in range(1, len(borders) - 1):
        for by in (-1, 1):
            if borders[i - 1] < borders[i] + by < borders[i + 1]:
                yield tuple(pairwise((*borders[:i], borders[i] + by, *borders[i + 1 :])))
