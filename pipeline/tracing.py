"""What a real run did and when, as JSON lines: the shape of the simulator's events, so that one overlays the other."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.actions import COMPUTE, Action


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One action of one rank. Times are of the machine's monotonic clock."""

    rank: int
    lane: str
    """`compute`, `send` (handing over) or `receive` (waiting)."""
    name: str
    """The action's short form, `2F0`."""
    step: int
    mb: int | None
    t0_ns: int
    t1_ns: int
    predicted_ns: int | None = None
    """How long the simulator said it would take."""


class Trace:
    """Collects the events of one rank. While something runs, only what costs little is done."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._seen: list[_Timed] = []

    @property
    def events(self) -> list[TraceEvent]:
        """What has been timed, in the order in which it ended."""
        return [_event(self._rank, seen) for seen in self._seen]

    def timed(self, action: Action, step: int, predicted_ns: int | None = None) -> _Timed:
        """Record a block as the run of an action; also when it raises."""
        return _Timed(self._seen, action, step, predicted_ns)

    def clear(self) -> None:
        """Forget the events."""
        self._seen.clear()

    def write(self, path: Path) -> None:
        """Append the events to a file of JSON lines, and forget them."""
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(event)) + "\n" for event in self.events)
        self.clear()


class _Timed:
    """One run of an action."""

    __slots__ = ("action", "begun", "ended", "predicted_ns", "seen", "step")

    def __init__(self, seen: list[_Timed], action: Action, step: int, predicted_ns: int | None) -> None:
        self.seen, self.action, self.step, self.predicted_ns = seen, action, step, predicted_ns

    def __enter__(self) -> None:
        self.begun = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        self.ended = time.monotonic_ns()
        self.seen.append(self)


def _event(rank: int, seen: _Timed) -> TraceEvent:
    op = seen.action.op
    lane = "compute" if op in COMPUTE else op.value.lower().replace("recv", "receive")
    return TraceEvent(
        rank, lane, seen.action.label, seen.step, seen.action.microbatch, seen.begun, seen.ended, seen.predicted_ns
    )


def read_trace(path: Path) -> list[TraceEvent]:
    """Return the events of a file."""
    return [TraceEvent(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
