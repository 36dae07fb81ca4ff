"""What the generators share: layer ranges, checks, and recompute as a transformation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from pipeline.actions import Action, Op
from pipeline.errors import ScheduleError
from pipeline.schedule import MOST_PAIRS, Schedule

Layers = Sequence[tuple[int, int]]


def even_stages(layers: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Ranges of `layers` over `stages`, sizes differing by at most one, the longer ones first.

    Raises ScheduleError when a stage would have no layer.
    """
    if stages < 1 or layers < stages:
        raise ScheduleError(f"{layers} layers do not fill {stages} stages; use at most {layers} stages")
    size, extra = divmod(layers, stages)
    borders = [s * size + min(s, extra) for s in range(stages + 1)]
    return tuple((borders[s], borders[s + 1]) for s in range(stages))


def balanced_stages(layer_s: Sequence[float], stages: int) -> tuple[tuple[int, int], ...]:
    """The contiguous split whose heaviest stage is lightest; of those, the one whose squared loads are least.

    `layer_s` is the time of each layer. Exact, by dynamic programming over (heaviest, sum of squares).
    """
    n = len(layer_s)
    even_stages(n, stages)
    total = [0.0]
    for t in layer_s:
        total.append(total[-1] + t)
    best = {0: ((0.0, 0.0), (0,))}
    for s in range(1, stages + 1):
        best = {
            hi: min(
                ((max(m, total[hi] - total[lo]), q + (total[hi] - total[lo]) ** 2), (*borders, hi))
                for lo, ((m, q), borders) in best.items()
                if lo < hi
            )
            for hi in range(s, n - (stages - s) + 1)
        }
    borders = best[n][1]
    return tuple(pairwise(borders))


def made(
    name: str, rows: Iterable[Iterable[Action]], layers: Layers | None, stages: int, microbatches: int
) -> Schedule:
    """A Schedule of generated rows; without `layers` each stage is one layer.

    Raises ScheduleError when the number of layer ranges is another than that of stages.
    """
    if layers is not None and len(layers) != stages:
        raise ScheduleError(f"{name} has {stages} stages here; got layer ranges for {len(layers)}")
    return Schedule(
        name=name,
        devices=tuple(tuple(row) for row in rows),
        stages=tuple(layers) if layers is not None else even_stages(stages, stages),
        num_microbatches=microbatches,
    )


def check_counts(name: str, devices: int, microbatches: int, stages_per_device: int = 1) -> None:
    """Raise ScheduleError unless there is at least one of each, and no more than can be written down."""
    if min(devices, microbatches, stages_per_device) < 1:
        raise ScheduleError(
            f"{name} got {devices} devices, {stages_per_device} stages a device and {microbatches} micro-batches; "
            "it needs at least one of each"
        )
    if devices * stages_per_device * microbatches > MOST_PAIRS:
        raise ScheduleError(
            f"{name} got {devices} devices, {stages_per_device} stages a device and {microbatches} micro-batches; "
            f"their product may be {MOST_PAIRS} at most"
        )


def with_recompute(schedule: Schedule, *, keep_last_stage: bool = False) -> Schedule:
    """The same schedule with an R before every backward that has none: forwards then keep only their input.

    With `keep_last_stage` the stage that holds the last layer keeps its activations.
    """
    have = schedule.recomputed()
    last = {s for s, (_, hi) in enumerate(schedule.stages) if hi == schedule.num_layers} if keep_last_stage else set()

    def lowered(row: Sequence[Action]) -> Iterable[Action]:
        for a in row:
            if a.op in (Op.B, Op.I) and (a.stage, a.microbatch) not in have and a.stage not in last:
                yield Action(Op.R, a.stage, a.microbatch, layers=a.layers, version=a.version)
            yield a

    return schedule.with_devices([tuple(lowered(row)) for row in schedule.devices])
