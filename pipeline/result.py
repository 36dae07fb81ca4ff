"""What a simulation says: makespan, the useful share, the bubble and its parts, memory, the critical path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.actions import COMPUTE, Action, Op
from pipeline.costs import Costs
from pipeline.graph import Graph
from pipeline.memory import memory_curves


@dataclass(frozen=True, slots=True)
class Times:
    """Start and end of every action in seconds, and the action whose end let it start; filled by the simulator."""

    start: list[float]
    end: list[float]
    cause: list[int | None]


@dataclass(frozen=True, slots=True)
class Span:
    """One action in time."""

    device: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubble:
    """Idle shares of all device time.

    fill: before a device's first action; drain: after its last. Between: `transfer`, while what it waits for is on its
    way or with the host's optimizer; else `switch` where it changes from one stage to another, and `imbalance` where
    it stays at one.
    """

    fill: float
    drain: float
    transfer: float
    switch: float
    imbalance: float

    @property
    def total(self) -> float:
        """The bubble as published: the idle share."""
        return self.fill + self.drain + self.transfer + self.switch + self.imbalance


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one simulated schedule. Shares are of devices x makespan."""

    name: str
    makespan_s: float
    useful: float
    """Share of forward and backward only; recompute is work that hides idling, and not counted."""
    bubble: Bubble
    peak_bytes: tuple[float, ...]
    """Per device."""
    memory: tuple[tuple[tuple[float, float], ...], ...]
    """Per device: (seconds, bytes from then on)."""
    spans: tuple[Span, ...]
    """Every action, in the order of the listing."""
    critical_path: tuple[Span, ...]
    """From time 0 to the makespan, each span started by the end of the one before."""

    def to_json(self) -> dict[str, Any]:
        """The numbers, without spans and curves."""
        parts = {k: getattr(self.bubble, k) for k in ("fill", "switch", "drain", "imbalance", "transfer")}
        return {
            "name": self.name,
            "makespan": self.makespan_s,
            "useful": self.useful,
            "bubble": {"total": self.bubble.total, **parts},
            "peak_bytes": list(self.peak_bytes),
            "critical_path": [s.action.label + f"@{s.device}" for s in self.critical_path],
        }


def account(graph: Graph, costs: Costs, times: Times) -> Result:
    """Sum up a finished simulation."""
    found = graph.listing
    spans = tuple(
        Span(d, a, times.start[i], times.end[i])
        for i, (a, (d, _)) in enumerate(zip(found.actions, found.where, strict=True))
    )
    makespan = max((s.end_s for s in spans), default=0.0)
    whole = makespan * found.schedule.num_devices or 1.0
    useful = sum(s.end_s - s.start_s for s in spans if s.action.op in COMPUTE and s.action.op is not Op.R)
    memory = memory_curves(found, costs, times.start, times.end)
    return Result(
        name=found.schedule.name,
        makespan_s=makespan,
        useful=useful / whole,
        bubble=_bubble(graph, spans, times, makespan, whole),
        peak_bytes=tuple(max(level for _, level in curve) for curve in memory),
        memory=memory,
        spans=spans,
        critical_path=_critical_path(spans, times),
    )


def _bubble(graph: Graph, spans: tuple[Span, ...], times: Times, makespan: float, whole: float) -> Bubble:
    parts = dict.fromkeys(("fill", "drain", "transfer", "switch", "imbalance"), 0.0)
    last: list[Span | None] = [None] * graph.listing.schedule.num_devices
    for i, span in enumerate(spans):
        if span.action.op not in COMPUTE:
            continue
        before, last[span.device] = last[span.device], span
        if before is None:
            parts["fill"] += span.start_s
            continue
        gap = span.start_s - before.end_s
        moving = min(gap, span.start_s - _compute_end_before(spans, times, i))
        parts["transfer"] += moving
        parts["switch" if span.action.stage != before.action.stage else "imbalance"] += gap - moving
    for span in last:
        parts["drain"] += makespan - (span.end_s if span is not None else 0.0)
    return Bubble(**{k: v / whole for k, v in parts.items()})


def _compute_end_before(spans: tuple[Span, ...], times: Times, i: int) -> float:
    """When the compute ended that, through transfers or none, let action i start; 0 when there was none."""
    j = times.cause[i]
    while j is not None and spans[j].action.op not in COMPUTE:
        j = times.cause[j]
    return 0.0 if j is None else spans[j].end_s


def _critical_path(spans: tuple[Span, ...], times: Times) -> tuple[Span, ...]:
    path: list[Span] = []
    i = max(range(len(spans)), key=lambda i: spans[i].end_s, default=None)
    while i is not None:
        path.append(spans[i])
        i = times.cause[i]
    return tuple(reversed(path))
