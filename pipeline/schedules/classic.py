"""GPipe (arXiv 1811.06965), 1F1B (arXiv 1806.03377) and looped breadth-first (arXiv 2211.05953)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.actions import Action, Op
from pipeline.schedule import Schedule
from pipeline.schedules.build import Layers, check_counts, made


def gpipe(*, devices: int, microbatches: int, layers: Layers | None = None) -> Schedule:
    """All forwards, then all backwards, both in order."""
    check_counts("gpipe", devices, microbatches)
    rows = ([Action(op, d, m) for op in (Op.F, Op.B) for m in range(microbatches)] for d in range(devices))
    return made("gpipe", rows, layers, devices, microbatches)


def one_f_one_b(*, devices: int, microbatches: int, layers: Layers | None = None) -> Schedule:
    """Device d runs devices - d - 1 forwards, then one forward and one backward in turn."""
    check_counts("1f1b", devices, microbatches)
    rows = (in_turn(d, microbatches, warmup=devices - d - 1) for d in range(devices))
    return made("1f1b", rows, layers, devices, microbatches)


def in_turn(stage: int, microbatches: int, warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then forward and backward in turn, then what is left."""
    warmup = min(warmup, microbatches)
    yield from (Action(Op.F, stage, m) for m in range(warmup))
    for m in range(microbatches):
        if warmup + m < microbatches:
            yield Action(Op.F, stage, warmup + m)
        yield Action(Op.B, stage, m)


def looped_bfs(
    *, devices: int, microbatches: int, stages_per_device: int = 2, layers: Layers | None = None
) -> Schedule:
    """Stage s on device s mod devices; every stage runs all micro-batches before the device's next stage."""
    check_counts("looped_bfs", devices, microbatches, stages_per_device)
    stages = devices * stages_per_device
    rows = (
        [Action(Op.F, s, m) for s in range(d, stages, devices) for m in range(microbatches)]
        + [Action(Op.B, s, m) for s in reversed(range(d, stages, devices)) for m in reversed(range(microbatches))]
        for d in range(devices)
    )
    return made("looped_bfs", rows, layers, stages, microbatches)
