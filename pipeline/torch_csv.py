"""The CSV of torch.distributed.pipelining: one row a rank, one action a cell, empty cells for waiting.

Both of its forms are read: compute only, and with SEND_F, RECV_F, SEND_B, RECV_B. `PipelineScheduleMulti._load_csv`
reads what `dump_csv` writes.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from pipeline.actions import COMPUTE, Action, Op, Phase
from pipeline.errors import ScheduleError
from pipeline.schedule import Schedule
from pipeline.schedules.build import even_stages

_COMPUTE = frozenset({Op.F, Op.B, Op.I, Op.W})
_TOGETHER = re.compile(r"\((.*)\)OVERLAP_F_B")
# Sharded data parallelism's own; a schedule of ours says nothing about them.
_SHARDING = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def dump_csv(schedule: Schedule) -> str:
    """The CSV text of a schedule of F, B, I, W, SEND and RECV.

    Raises ScheduleError for ops that the format cannot say.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in schedule.devices:
        writer.writerow(
            [_cell(action) for action in row if not (action.op is Op.FREE and action.microbatch is not None)]
        )
    return text.getvalue()


def _cell(action: Action) -> str:
    if action.op not in _COMPUTE and action.op not in (Op.SEND, Op.RECV):
        raise ScheduleError(
            f"{action.label} has no form in the CSV of torch.distributed.pipelining, which knows F, B, I, W, SEND and "
            "RECV; keep this schedule as text or JSON"
        )
    return action.label


def load_csv(text: str, *, name: str = "csv", layers: Sequence[tuple[int, int]] | None = None) -> Schedule:
    """Read CSV text; stages hold `layers`, or one each. Peers of messages follow from where stages compute.

    UNSHARD, RESHARD and REDUCE_GRAD are left out; the two halves of an OVERLAP_F_B run in the order they stand in. A
    RECV of torch begins to receive, and what needs the message waits for it; here the list waits at a RECV, so each
    one is put just before what needs it, in its peer's order.

    Raises ScheduleError for cells that are no action, and for stages on two ranks.
    """
    try:
        rows = [[a for cell in line for a in _actions(cell)] for line in csv.reader(io.StringIO(text))]
    except csv.Error as e:
        raise ScheduleError(f"this is no CSV: {e}") from e
    found = [a for row in rows for a in row]
    if not any(a.op in COMPUTE for a in found):
        raise ScheduleError(f"the CSV has {len(rows)} rows and no compute action; it needs cells such as 0F0 and 0B0")
    stages = max(a.stage for a in found) + 1
    microbatches = max(a.microbatch or 0 for a in found) + 1
    if max(stages, microbatches) > len(found):
        raise ScheduleError(
            f"the CSV names stage {stages - 1} and micro-batch {microbatches - 1} and has {len(found)} actions; every "
            "stage and every micro-batch has one at least"
        )
    schedule = Schedule(
        name=name,
        devices=tuple(tuple(row) for row in rows),
        stages=tuple(layers) if layers is not None else even_stages(stages, stages),
        num_microbatches=microbatches,
    )
    owner = schedule.devices_of_stage()

    def with_peer(a: Action) -> Action:
        if a.op not in (Op.SEND, Op.RECV):
            return a
        other = a.stage + (1 if (a.op is Op.SEND) == (a.phase is Phase.F) else -1)
        if other not in owner:
            raise ScheduleError(f"{a.label} has no stage {other} at its other end; there are {sorted(owner)}")
        return replace(a, peer=owner[other])

    return schedule.with_devices([_awaited([with_peer(a) for a in row]) for row in schedule.devices])


def _awaited(row: Sequence[Action]) -> list[Action]:
    """Move every RECV of a device to where it is waited for."""
    begun: dict[int | None, list[Action]] = defaultdict(list)  # by peer
    found: list[Action] = []
    for action in row:
        if action.op is Op.RECV:
            begun[action.peer].append(action)
            continue
        for queue in begun.values():
            count = max((n for n, recv in enumerate(queue, start=1) if _needs(action, recv)), default=0)
            found += queue[:count]
            del queue[:count]
        found.append(action)
    return [*found, *(recv for queue in begun.values() for recv in queue)]


def _needs(action: Action, recv: Action) -> bool:
    ops = (Op.F,) if recv.phase is Phase.F else (Op.B, Op.I)
    return action.op in ops and (action.stage, action.microbatch) == (recv.stage, recv.microbatch)


def _actions(cell: str) -> list[Action]:
    cell = cell.strip()
    together = _TOGETHER.fullmatch(cell)
    if together:
        return [Action.parse(part) for part in together[1].split(";")]
    if not cell or _SHARDING.fullmatch(cell):
        return []
    return [Action.parse(cell)]
