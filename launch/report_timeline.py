"""A step in time: what the ranks did, and what was predicted, from the trace events of a run. Pure but for reading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.actions import COMPUTE, Action, Op
from pipeline.costs import Costs
from pipeline.schedule import Schedule
from pipeline.simulate import simulate
from pipeline.tracing import TraceEvent, read_trace


@dataclass(frozen=True, slots=True)
class Bar:
    """Something a rank computes. Seconds from the beginning of the step."""

    rank: int
    backward: bool
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step of all ranks."""

    step: int
    ranks: tuple[int, ...]
    """Those that took part, were it without a chunk."""
    measured: tuple[Bar, ...]
    predicted: tuple[Bar, ...]
    how: str
    """What the prediction is, in words; empty where there is none."""


def read_timeline(folder: Path) -> Timeline | None:
    """Return the step that a run's trace holds; None where there is no whole one."""
    try:
        ranks = [read_trace(path) for path in sorted(folder.glob("rank-*.jsonl"))]
        schedule = folder / "schedule.json"
        plan = Schedule.from_json(schedule.read_text(encoding="utf-8")) if schedule.exists() else None
    except (OSError, ValueError, TypeError):
        return None
    return make_timeline([[event for event in rank if event.lane == "compute"] for rank in ranks], plan)


def make_timeline(ranks: Sequence[Sequence[TraceEvent]], schedule: Schedule | None) -> Timeline | None:
    """Return the newest step of which there are events, aligned where each rank begins: clocks of hosts differ."""
    step = max((event.step for rank in ranks for event in rank), default=None)
    if step is None:
        return None
    now = [[event for event in rank if event.step == step] for rank in ranks]
    begun = min(event.t0_ns for rank in now for event in rank)
    measured = tuple(
        Bar(event.rank, _is_backward(event), (event.t0_ns - begun) / 1e9, (event.t1_ns - begun) / 1e9)
        for rank in now
        for event in rank
    )
    there = tuple(n for n, (rank, events) in enumerate(zip(ranks, now, strict=True)) if events or not rank)
    if schedule is not None:
        pipelines = max(len(ranks) // len(schedule.devices), 1)
        found = _simulated(schedule, [event for rank in now for event in rank], pipelines)
        how = "the schedule" if pipelines == 1 else "the first pipeline's schedule"
        how = f"{how} simulated with what its actions took, links without cost"
        return Timeline(step, there, measured, found, how)
    return Timeline(step, there, measured, tuple(_planned(now)), "each chunk by the planner's cost")


def _planned(ranks: Iterable[Sequence[TraceEvent]]) -> Iterable[Bar]:
    for rank in ranks:
        at = 0.0
        for event in rank:
            if event.predicted_ns is not None:
                yield Bar(event.rank, _is_backward(event), at, at + event.predicted_ns / 1e9)
                at += event.predicted_ns / 1e9


def _simulated(schedule: Schedule, events: Iterable[TraceEvent], pipelines: int) -> tuple[Bar, ...]:
    """Run the schedule, of the first of the pipelines, with the measured duration of each stage and micro-batch."""
    took: dict[tuple[Op, int, int], float] = {}
    for event in events:
        if event.rank % pipelines == 0:
            action = Action.parse(event.name)
            took[action.op, action.stage, action.microbatch or 0] = (event.t1_ns - event.t0_ns) / 1e9
    free = Costs.uniform(max(hi for _, hi in schedule.stages), forward_s=0.0, backward_s=0.0)
    spans = [span for span in simulate(schedule, free, took=took).spans if span.action.op in COMPUTE]
    return tuple(
        Bar(span.device * pipelines, span.action.op not in (Op.F, Op.R), span.start_s, span.end_s) for span in spans
    )


def _is_backward(event: TraceEvent) -> bool:
    return not event.name.lstrip("0123456789").startswith(("F", "f", "R")) or "FB" in event.name
