"""What a real run did and when, as JSON lines: the shape of the simulator's events, so that one overlays the other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Collects the events of one rank."""

    def __init__(self, rank: int) -> None:
        self.events: list[TraceEvent] = []
        self._rank = rank

    @contextmanager
    def timed(self, action: Action, step: int, predicted_ns: int | None = None) -> Iterator[None]:
        """Record a block as the run of an action; also when it raises."""
        begun = time.monotonic_ns()
        try:
            yield
        finally:
            lane = "compute" if action.op in COMPUTE else action.op.value.lower().replace("recv", "receive")
            ended = time.monotonic_ns()
            self.events.append(
                TraceEvent(self._rank, lane, action.label, step, action.microbatch, begun, ended, predicted_ns)
            )

    def write(self, path: Path) -> None:
        """Append the events to a file of JSON lines, and forget them."""
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(event)) + "\n" for event in self.events)
        self.events.clear()


def read_trace(path: Path) -> list[TraceEvent]:
    """Return the events of a file."""
    return [TraceEvent(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
