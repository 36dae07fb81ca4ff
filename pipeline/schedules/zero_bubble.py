"""Zero-bubble schedules (arXiv 2401.10241): H1, with the memory of 1F1B, and ZBV, two stages a device in a V.

Backward is split: I, the input gradient, which the stage before waits for, and W, the weight gradient, which nothing
waits for and which fills what would be bubbles.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.actions import Action, Op
from pipeline.schedule import Schedule
from pipeline.schedules.build import Layers, check_counts, made
from pipeline.schedules.classic import in_turn


def zb_h1(*, devices: int, microbatches: int, layers: Layers | None = None) -> Schedule:
    """1F1B whose device d runs the weight half d backwards later (section 2.2, figure 2)."""
    check_counts("zb_h1", devices, microbatches)

    def row(d: int) -> Iterator[Action]:
        for a in in_turn(d, microbatches, warmup=devices - d - 1):
            if a.op is Op.F or a.microbatch is None:
                yield a
                continue
            yield Action(Op.I, d, a.microbatch)
            if a.microbatch >= d:
                yield Action(Op.W, d, a.microbatch - d)
        yield from (Action(Op.W, d, m) for m in range(max(0, microbatches - d), microbatches))

    return made("zb_h1", [row(d) for d in range(devices)], layers, devices, microbatches)


def zbv(*, devices: int, microbatches: int, layers: Layers | None = None) -> Schedule:
    """Device d holds stages d and 2 * devices - 1 - d (section 6)."""
    check_counts("zbv", devices, microbatches)
    rows = [[a for a in _v_row(d, devices, microbatches) if (a.microbatch or 0) < microbatches] for d in range(devices)]
    return made("zbv", rows, layers, 2 * devices, microbatches)


def _v_row(d: int, devices: int, microbatches: int) -> Iterator[Action]:
    """The row for at least 2 * devices - 1 micro-batches; the caller drops those there are not."""
    total = max(microbatches, 2 * devices - 1)
    down, up = d, 2 * devices - 1 - d
    done = dict.fromkeys([(op, s) for op in (Op.F, Op.I, Op.W) for s in (down, up)], 0)

    def run(stage: int, *ops: Op) -> Iterator[Action]:
        for op in ops:
            yield Action(op, stage, done[op, stage])
            done[op, stage] += 1

    for _ in range(2 * (devices - d) - 1):
        yield from run(down, Op.F)
    for _ in range(d):
        yield from run(up, Op.F)
        yield from run(down, Op.F)
    for _ in range(devices - d):
        yield from run(up, Op.F, Op.I, Op.W)
    while done[Op.F, up] < total:
        if done[Op.F, down] < total:
            yield from run(down, Op.F)
        yield from run(down, Op.I, Op.W)
        yield from run(up, Op.F, Op.I, Op.W)
    for _ in range(d):
        yield from run(down, Op.I)
        yield from run(up, Op.I)
    for _ in range(devices - d):
        yield from run(down, Op.I, Op.W)
    for stage in (up, down):
        for _ in range(total - done[Op.W, stage]):
            yield from run(stage, Op.W)
