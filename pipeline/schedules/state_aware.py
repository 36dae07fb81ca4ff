"""State-aware 1F1B (ChunkFlow, arXiv 2503.02356, section 4.3): 1F1B over chunks, groups of dependent ones among them.

A group runs forward in ascending and backward in descending order on every stage; all but its last `retain` chunks run
forward again before their backward. A literal 1F1B over groups starves the stages behind: before B(x), stage r has to
have run devices - r - 1 forwards *after* F(x), and one more with each further backward. Counting these in chunks costs
the memory of 1F1B and a few chunks; counting them in whole groups (`ahead="groups"`) keeps more, and waits less, since
the backward of a group of n chunks feeds the next stage nothing for n forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from pipeline.actions import Action, Op
from pipeline.errors import PlanError
from pipeline.schedule import Schedule
from pipeline.schedules.build import Layers, check_counts, made
from pipeline.units import Unit


def state_aware_1f1b(
    *,
    devices: int,
    units: Sequence[Unit] | None = None,
    microbatches: int | None = None,
    layers: Layers | None = None,
    ahead: Literal["chunks", "groups"] = "chunks",
) -> Schedule:
    """The schedule of `units` in the order they stand in; micro-batch m is units[m].

    A FREE of the first chunk of a group tells the stage to drop the group's state. Without units, `microbatches`
    standalone ones of one token each, which is plain 1F1B.

    Raises PlanError for groups that are torn, incomplete or out of order.
    """
    units = tuple(units) if units is not None else (Unit(1),) * (microbatches or 0)
    check_counts("state_aware_1f1b", devices, len(units))
    if microbatches not in (None, len(units)):
        raise PlanError(f"{microbatches} micro-batches are asked for, and {len(units)} units are given")
    backwards = backward_order(units)
    needs = (forwards_needed(units, backwards, devices - d, ahead) for d in range(devices))
    rows = [_row(d, units, backwards, need) for d, need in enumerate(needs)]
    schedule = made("state_aware_1f1b", rows, layers, devices, len(units))
    return replace(schedule, units=units)


def _row(stage: int, units: Sequence[Unit], backwards: Sequence[int], needs: Sequence[int]) -> Iterator[Action]:
    forwards = 0
    for m, need in zip(backwards, needs, strict=True):
        yield from (Action(Op.F, stage, f) for f in range(forwards, need))
        forwards = need
        if not units[m].kept:
            yield Action(Op.R, stage, m)
        yield Action(Op.B, stage, m)
        if units[m].group is not None and units[m].index == 0:
            yield Action(Op.FREE, stage, m)


def forwards_needed(units: Sequence[Unit], backwards: Sequence[int], lead: int, ahead: str) -> list[int]:
    """How many forwards a stage has run before each backward; `lead` is 1 on the last stage, devices on the first.

    What the next group or unit needs is run one at a time between the backwards before it, and no further ahead, or
    the backwards of a long group would fill the memory with forwards.
    """
    ends: list[int] = []
    block: list[int] = []
    for m, unit in enumerate(units):
        block.append(len(ends))
        if unit.index == unit.count - 1:
            ends.append(m + 1)

    def least(m: int) -> int:
        after = ends[min(block[m] + lead, len(ends)) - 1] if ahead == "groups" else 0
        return min(max(after, m + lead), len(units))

    needs, count = [], 0
    for m in backwards:
        following = least(ends[block[m] + 1] - 1) if block[m] + 1 < len(ends) else len(units)
        count = max(least(m), min(count + bool(needs), following))
        needs.append(count)
    return needs


def backward_order(units: Sequence[Unit]) -> list[int]:
    """Micro-batches in the order of their backwards: as they stand, but each group reversed.

    Raises PlanError for groups that are torn, incomplete or out of order.
    """
    order: list[int] = []
    seen: set[int] = set()
    m = 0
    while m < len(units):
        unit = units[m]
        members = units[m : m + unit.count]
        expected = [(unit.group, i, unit.count, unit.retain) for i in range(unit.count)]
        if unit.group in seen or [(u.group, u.index, u.count, u.retain) for u in members] != expected:
            raise PlanError(
                f"units {m} to {m + len(members) - 1} are {' '.join(map(str, members))}; the chunks of group "
                f"{unit.group} stand together, once, ascending from 0 to {unit.count - 1} and with one retain"
            )
        if unit.group is not None:
            seen.add(unit.group)
        order += reversed(range(m, m + unit.count))
        m += unit.count
    return order
