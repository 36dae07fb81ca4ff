"""Where the time of a step goes on a rank, and what ran when: seconds by part, and trace events (interfaces, G).

data        waiting for the loader
compute     forwards and backwards of chunks
bubble      of a pipeline's rank: between its first and its last action, computing nothing
exchange    what forward and backward take beyond these: gradients on their way, and waiting for slower ranks
update      clipping and the optimizer
checkpoint  beginning a save, and waiting until what the optimizer changes is copied

On an accelerator, ops return before they are done; there the parts are those of the host's queue.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from chunkflow.records import Chunk
from launch.files import write_lines
from moe.issue import Span
from moe.tracing import from_spans
from pipeline.schedule import Schedule
from pipeline.tracing import Trace, TraceEvent

PARTS: tuple[str, ...] = ("data", "compute", "bubble", "exchange", "update", "checkpoint")
_OP_COST = {"f": 1.0, "F": 1.0, "B": 2.0}
"""Of an op, in forwards."""


class StepTimes:
    """The clock of one rank. `pipeline` is given to a runtime that traces; `operation` to a runner of chunks."""

    def __init__(self, rank: int) -> None:
        self.pipeline = Trace(rank)
        self.fence: Callable[[], object] = lambda: None
        """Waits until a save under way has copied what the optimizer is about to change."""
        self.schedule: Schedule | None = None
        """Of the last step, in a pipeline."""
        self.experts: list[Span] = []
        """Of the last step: what moved and computed in expert-parallel layers."""
        self._rank, self._step = rank, 0
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._events: list[TraceEvent] = []
        self._work: list[tuple[float, float]] = []
        """Of each event of `operation`: tokens and pairs of attention, times what the op costs."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what the block takes to a part."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begun

    @contextmanager
    def training(self, step: int) -> Iterator[None]:
        """Surround forward and backward of a step, counted from 1 as in the log."""
        self._step, self._events, self._work = step, [], []
        self.pipeline.clear()
        self.experts.clear()
        begun = time.monotonic_ns()
        yield
        ended, own = time.monotonic_ns(), self._events
        self._events = [*own, *self.pipeline.events]
        computed = [event for event in self._events if event.lane == "compute"]
        compute_ns = sum(event.t1_ns - event.t0_ns for event in computed)
        last_ns = max((event.t1_ns for event in computed), default=ended)
        bubble_ns = last_ns - begun - compute_ns if computed and not own else 0
        self._seconds["compute"] += compute_ns / 1e9
        self._seconds["bubble"] += bubble_ns / 1e9
        self._seconds["exchange"] += (ended - begun - compute_ns - bubble_ns) / 1e9

    def operation(self, op: str, chunk: Chunk, seconds: float) -> None:
        """Note an op on a chunk that has just ended."""
        ended = time.monotonic_ns()
        begun = ended - round(seconds * 1e9)
        self._events.append(TraceEvent(self._rank, "compute", op, self._step, len(self._events), begun, ended))
        pairs = sum(s.length * s.start + s.length * (s.length + 1) / 2 for s in chunk.segments)
        self._work.append((_OP_COST[op] * chunk.num_tokens, _OP_COST[op] * pairs))

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        taken = self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return taken

    def write(self, path: Path, *, pair_cost: float) -> None:
        """Write the events of the last step, those before are gone; predicted are chunks, by the planner's cost.

        The planner knows costs up to a factor, which is taken from this rank's own step.
        """
        events = self._events
        if self._work:
            costs = [tokens + pair_cost * pairs for tokens, pairs in self._work]
            scale = sum(event.t1_ns - event.t0_ns for event in events) / sum(costs)
            events = [replace(e, predicted_ns=round(scale * c)) for e, c in zip(events, costs, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [json.dumps(asdict(event)) for event in events])
        experts = path.with_name(f"experts-{self._rank:05}.jsonl")
        if self.experts:
            spans = from_spans(self.experts, rank=self._rank, step=self._step)
            write_lines(experts, [json.dumps(asdict(one)) for one in spans])
        else:
            experts.unlink(missing_ok=True)  # of a run that went on without
        if self._rank == 0:
            schedule = path.with_name("schedule.json")
            if self.schedule is None:
                schedule.unlink(missing_ok=True)  # of a run that went on without a pipeline
            else:
                write_lines(schedule, [json.dumps(self.schedule.to_json())])


def over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, tuple[float, ...]]:
    """Return each value of all ranks, by rank. Every rank calls, with the same names: a collective."""
    mine = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    table = torch.stack(rows).T.tolist()
    return {name: tuple(row) for name, row in zip(values, table, strict=True)}


def straggler_ratio(compute: Sequence[float]) -> float:
    """Return the slowest rank's computing over the mean; 1 is even."""
    mean = sum(compute) / len(compute)
    return max(compute) / mean if mean else 1.0
