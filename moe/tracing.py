"""Timelines: events as JSON lines, for Perfetto, and drawn as predicted over measured.

An event is `{rank, lane, name, step, mb, t0_ns, t1_ns, predicted_ns}`; `predicted_ns` is how long it should take, or
null. Whole reports of a run are made by `launch.report`; this is one layer or step, close up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe.errors import MoeConfigError
from moe.issue import Span
from moe.plan import COMPUTE, INTER, INTRA
from moe.simulate import Event

LANES = (INTER, INTRA, COMPUTE)
_MOST_NS = 2**63
COLOURS = {
    "dispatch": "#4878d0",
    "combine": "#6acc64",
    "gradient": "#d65f5f",
    "gather": "#956cb4",
    "scatter": "#8c613c",
    "expert": "#ee854a",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEvent:
    """One operation on one lane of one rank."""

    rank: int
    lane: str
    name: str
    step: int = 0
    mb: int = 0
    t0_ns: int
    t1_ns: int
    predicted_ns: int | None = None


def from_spans(spans: Iterable[Span], *, rank: int, step: int = 0) -> list[TraceEvent]:
    """Return what the lanes recorded as events, by start; `mb` counts the passes of a layer in one direction."""
    events, passes = [], dict[tuple[str, bool], int]()
    seen: dict[tuple[str, bool], set[tuple[str, str]]] = {}
    for s in sorted(spans, key=lambda s: s.t0_ns):
        key = (s.layer, _is_backward(s.op))
        if (s.link, s.op) in seen.setdefault(key, set()):  # within a pass every operation is there once
            passes[key] = passes.get(key, 0) + 1
            seen[key].clear()
        seen[key].add((s.link, s.op))
        name, mb = f"{s.op} {s.layer}".strip(), passes.get(key, 0)
        events.append(TraceEvent(rank=rank, lane=s.link, name=name, step=step, mb=mb, t0_ns=s.t0_ns, t1_ns=s.t1_ns))
    return events


def chosen(
    events: Sequence[TraceEvent], *, layer: str | None = None, way: str | None = None, mb: int | None = None
) -> list[TraceEvent]:
    """Return the events of one layer, direction or pass. Raises MoeConfigError, with the layers, where there are none.

    The gradients that a backward hides belong to it; those of the end of a step belong to no layer.
    """
    found = [
        e
        for e in events
        if (layer is None or e.name.endswith(f" {layer}"))
        and (way is None or _is_backward(e.name) == (way == "backward"))
        and (mb is None or e.mb == mb)
    ]
    if not found:
        layers = sorted({last for e in events if not (last := e.name.rpartition(" ")[2]).isdigit()})
        raise MoeConfigError(
            f"there is no event of layer {layer or 'any'}, {way or 'either way'}, pass {'any' if mb is None else mb}; "
            f"the layers are {', '.join(layers) or 'without names'}"
        )
    return found


def _is_backward(name: str) -> bool:
    return name.startswith(("backward ", "gradient"))


def from_timeline(events: Iterable[Event], *, start_ns: int = 0) -> list[TraceEvent]:
    """Return a predicted timeline as events; their `predicted_ns` is their length."""
    made = []
    for e in events:
        t0_ns, t1_ns = (start_ns + round(t * 1e9) for t in (e.t0_s, e.t1_s))
        name = e.op.name if e.op.name == "gradient" else f"{e.op.name} {e.op.chunk}"
        made.append(TraceEvent(rank=0, lane=e.lane, name=name, t0_ns=t0_ns, t1_ns=t1_ns, predicted_ns=t1_ns - t0_ns))
    return made


def write_events(path: str | Path, events: Iterable[TraceEvent]) -> None:
    """Write one JSON object a line."""
    Path(path).write_text("".join(json.dumps(asdict(e)) + "\n" for e in events))


def read_events(path: str | Path) -> list[TraceEvent]:
    """Read what `write_events` wrote, also with fields of others; MoeConfigError names the line that is wrong."""
    known = {f.name for f in fields(TraceEvent)}
    events = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            event = TraceEvent(**{k: v for k, v in json.loads(line).items() if k in known})
            _check_event(event)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise MoeConfigError(f"{path} line {number} is no trace event: {error}") from None
        events.append(event)
    if not events:
        raise MoeConfigError(f"{path} holds no trace events; write some with `python -m moe simulate --events FILE`")
    return events


def _check_event(event: TraceEvent) -> None:
    for name in ("lane", "name"):
        if not isinstance(value := getattr(event, name), str):
            raise ValueError(f"{name} is {value!r}; it must be a text")
    for name in ("rank", "step", "mb"):
        if not isinstance(value := getattr(event, name), int):
            raise ValueError(f"{name} is {value!r}; it must be an integer")
    for name in ("t0_ns", "t1_ns", "predicted_ns"):
        value = getattr(event, name)
        is_missing = value is None and name == "predicted_ns"
        if not is_missing and not (isinstance(value, (int, float)) and abs(value) < _MOST_NS):
            raise ValueError(f"{name} is {value!r}; it must be a number of nanoseconds")
    if not event.t0_ns <= event.t1_ns:
        raise ValueError(f"it ends at {event.t1_ns}, before its start at {event.t0_ns}")


def perfetto(measured: Sequence[TraceEvent], predicted: Sequence[TraceEvent] = ()) -> dict[str, Any]:
    """Return Chrome's trace format, which ui.perfetto.dev opens: one process a rank, predicted ones beside them."""
    made: list[dict[str, Any]] = []
    tracks: set[tuple[str, str]] = set()
    for kind, events in (("predicted", _from_zero(predicted)), ("rank", _from_zero(measured))):
        for e in events:
            process = kind if kind == "predicted" else f"rank {e.rank}"
            tracks.add((process, e.lane))
            made.append({
                "ph": "X", "name": e.name, "cat": e.lane, "pid": process, "tid": e.lane,
                "ts": e.t0_ns / 1e3, "dur": (e.t1_ns - e.t0_ns) / 1e3,
                "args": {"step": e.step, "mb": e.mb, "predicted_ns": e.predicted_ns},
            })  # fmt: skip
    pids = {name: i for i, name in enumerate(sorted({p for p, _ in tracks}))}
    tids = {track: i for i, track in enumerate(sorted(tracks))}
    for event in made:
        event["tid"], event["pid"] = tids[event["pid"], event["tid"]], pids[event["pid"]]
    names = [{"ph": "M", "name": "process_name", "pid": i, "args": {"name": n}} for n, i in pids.items()]
    names += [
        {"ph": "M", "name": "thread_name", "pid": pids[p], "tid": i, "args": {"name": lane}}
        for (p, lane), i in tids.items()
    ]
    return {"traceEvents": names + made, "displayTimeUnit": "ms"}


def draw(
    path: str | Path, measured: Sequence[TraceEvent], predicted: Sequence[TraceEvent] = (), *, rank: int = 0
) -> None:
    """Draw one rank's lanes, predicted above measured, as SVG (or what the suffix says)."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [("predicted", _from_zero(predicted)), ("measured", _from_zero([e for e in measured if e.rank == rank]))]
    rows = [(lane, kind, events) for lane in LANES for kind, events in shown if events]
    figure = Figure(figsize=(10, 0.5 + 0.45 * len(rows)))
    kinds = FigureCanvasSVG(figure).get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise MoeConfigError(f"{path} has the suffix of no picture; use one of {', '.join(f'.{k}' for k in kinds)}")
    axes = figure.subplots()
    for y, (lane, _, events) in enumerate(rows):
        for e in (e for e in events if e.lane == lane):
            colour = next((c for name, c in COLOURS.items() if name in e.name), "#999999")
            bar = [(e.t0_ns / 1e6, (e.t1_ns - e.t0_ns) / 1e6)]
            axes.broken_barh(bar, (y - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(len(rows)), [f"{lane}, {kind}" for lane, kind, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=patches, ncols=len(patches), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def _from_zero(events: Sequence[TraceEvent]) -> list[TraceEvent]:
    start = min((e.t0_ns for e in events), default=0)
    return [replace(e, t0_ns=e.t0_ns - start, t1_ns=e.t1_ns - start) for e in events]
