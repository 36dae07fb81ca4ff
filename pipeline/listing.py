"""The actions of a schedule, numbered through, with the look-ups that its dependencies are found by."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from pipeline.actions import FORWARD, Action, Op, Phase
from pipeline.errors import ScheduleError
from pipeline.schedule import Schedule


def error_at(schedule: Schedule, where: tuple[int, int], message: str) -> ScheduleError:
    """A ScheduleError that shows the table with an arrow at (device, position)."""
    device, position = where
    action = schedule.devices[device][position]
    return ScheduleError(
        f"{schedule.name}, device {device}, position {position}, {action.label}: {message}\n"
        f"{schedule.table(at=where, context=6)}"
    )


def boundary(schedule: Schedule, action: Action) -> int:
    """The layer boundary that a message crosses; boundary i lies before layer i."""
    lo, hi = schedule.layers(action)
    return hi if (action.op in (Op.SEND, Op.PUT)) == (action.phase is Phase.F) else lo


@dataclass(frozen=True, slots=True)
class Listing:
    """`actions[i]` stands at `where[i]`, a (device, position); numbers go through device 0 first, then device 1."""

    schedule: Schedule
    actions: tuple[Action, ...]
    where: tuple[tuple[int, int], ...]
    local: dict[tuple, list[int]]
    """(device, op, stage, micro-batch) to numbers, ascending."""
    arrivals: dict[tuple, list[int]]
    """(device, phase, boundary, micro-batch) to the RECV and GET actions, ascending."""
    puts: dict[tuple, list[int]]
    """(phase, boundary, micro-batch) to the PUT actions."""
    uploads: dict[tuple[int, int], list[int]]
    """(device, stage) to its UPLOAD actions, ascending."""
    streamed: set[int]
    """Devices with an UPLOAD, on which weights are only what was uploaded."""
    forwards: dict[int, list[int]]
    """Micro-batch to its F and FB actions."""
    gradients: dict[tuple[int, int], list[int]]
    """(boundary, micro-batch) to the B, I and FB actions that make the gradient there."""

    def fail(self, i: int, message: str) -> ScheduleError:
        """The error to raise about action i."""
        return error_at(self.schedule, self.where[i], message)

    def before(self, found: list[int], i: int) -> int | None:
        """The last of `found` before action i."""
        at = bisect_left(found, i)
        return found[at - 1] if at else None

    def own(self, i: int, *ops: Op) -> int | None:
        """The last action before i on its device with one of `ops` and the same stage and micro-batch."""
        a, device = self.actions[i], self.where[i][0]
        found = (self.before(self.local.get((device, op, a.stage, a.microbatch), []), i) for op in ops)
        return max((j for j in found if j is not None), default=None)

    def arrival(self, i: int, phase: Phase, at: int) -> int | None:
        """The message that brings boundary `at` of the micro-batch of i to its device, before i."""
        key = (self.where[i][0], phase, at, self.actions[i].microbatch)
        return self.before(self.arrivals.get(key, []), i)

    def forward_producer(self, microbatch: int, at: int) -> int | None:
        """The forward whose layers end at, or hold in their middle, boundary `at`."""
        for j in self.forwards.get(microbatch, []):
            lo, hi = self.schedule.layers(self.actions[j])
            if lo < at <= hi:
                return j
        return None


def listing(schedule: Schedule) -> Listing:
    """Number the actions of a schedule."""
    found = Listing(schedule, *_numbered(schedule), {}, {}, {}, {}, set(), {}, {})
    for i, action in enumerate(found.actions):
        device, mb = found.where[i][0], action.microbatch
        found.local.setdefault((device, action.op, action.stage, mb), []).append(i)
        if action.op in (Op.RECV, Op.GET):
            found.arrivals.setdefault((device, action.phase, boundary(schedule, action), mb), []).append(i)
        if action.op is Op.UPLOAD:
            found.uploads.setdefault((device, action.stage), []).append(i)
            found.streamed.add(device)
        if action.op is Op.PUT:
            found.puts.setdefault((action.phase, boundary(schedule, action), mb), []).append(i)
        if action.op in FORWARD and mb is not None:
            found.forwards.setdefault(mb, []).append(i)
        if action.op in (Op.B, Op.I, Op.FB) and mb is not None:
            found.gradients.setdefault((schedule.layers(action)[0], mb), []).append(i)
    return found


def _numbered(schedule: Schedule) -> tuple[tuple[Action, ...], tuple[tuple[int, int], ...]]:
    pairs = [(a, (d, p)) for d, row in enumerate(schedule.devices) for p, a in enumerate(row)]
    return tuple(a for a, _ in pairs), tuple(w for _, w in pairs)
