"""Pictures of a simulation or a run: trace events, Perfetto JSON, and a Gantt chart as SVG. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pipeline.actions import COMPUTE, Op
from pipeline.errors import PlanError
from pipeline.result import Result, Span
from pipeline.schedule import Schedule

_LANES = {
    Op.UPLOAD: "h2d",
    Op.GET: "h2d",
    Op.DOWNLOAD: "d2h",
    Op.PUT: "d2h",
    Op.SEND: "send",
    Op.RECV: "recv",
    Op.OPT: "host",
}
_COLOURS = {Op.F: "#7aa6d8", Op.B: "#e2a35c", Op.I: "#e2a35c", Op.W: "#8fbf7f", Op.R: "#c5ccd6", Op.FB: "#b58ac9"}
_LEGEND = {
    Op.F: "F forward",
    Op.B: "B backward",
    Op.I: "I backward, input",
    Op.W: "W backward, weights",
    Op.R: "R forward again",
    Op.FB: "FB forward, backward",
}
_EVENT_KEYS = {"rank", "lane", "name", "step", "mb", "t0_ns", "t1_ns", "predicted_ns"}


def lane(op: Op) -> str:
    """Where on its device an op runs: compute, h2d, d2h, send, recv or host."""
    return _LANES.get(op, "compute")


def trace_events(schedule: Schedule, result: Result) -> list[dict[str, Any]]:
    """A simulation as trace events: `{rank, lane, name, step, mb, t0_ns, t1_ns, predicted_ns}`.

    `predicted_ns` is the predicted duration; a real run has its own t0 and t1 beside it.
    """
    return [
        {
            "rank": s.device,
            "lane": lane(s.action.op),
            "name": s.action.label,
            "step": schedule.step(s.action.microbatch or 0),
            "mb": s.action.microbatch,
            "t0_ns": round(s.start_s * 1e9),
            "t1_ns": round(s.end_s * 1e9),
            "predicted_ns": round((s.end_s - s.start_s) * 1e9),
        }
        for s in result.spans
        if s.action.op is not Op.FREE
    ]


def perfetto(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Trace events of named runs ("predicted", "measured") as the JSON that ui.perfetto.dev opens.

    Each run is a process, begun at its own first event; each (rank, lane) is a thread in it.

    Raises PlanError for events without one of the agreed keys.
    """
    found: list[dict[str, Any]] = []
    for pid, (run, events) in enumerate(runs.items()):
        found.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": run}})
        for n, event in enumerate(events):
            _check_event(event, f"event {n} of {run}")
        first = min((e["t0_ns"] for e in events), default=0)
        threads = sorted({(e["rank"], e["lane"]) for e in events})
        for tid, (rank, name) in enumerate(threads):
            args = {"name": f"rank {rank} {name}"}
            found.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": args})
        found += [
            {
                "ph": "X",
                "pid": pid,
                "tid": threads.index((e["rank"], e["lane"])),
                "name": e["name"],
                "ts": (e["t0_ns"] - first) / 1000,
                "dur": (e["t1_ns"] - e["t0_ns"]) / 1000,
                "args": {"step": e["step"], "mb": e["mb"], "predicted_us": (e["predicted_ns"] or 0) / 1000},
            }
            for e in events
        ]
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def _check_event(event: Any, which: str) -> None:
    if not isinstance(event, Mapping) or not event.keys() >= _EVENT_KEYS:
        got = sorted(event) if isinstance(event, Mapping) else event
        raise PlanError(f"{which} lacks keys of {sorted(_EVENT_KEYS)}; got {str(got)[:200]}")
    kinds = {"rank": int, "lane": str, "name": str, "t0_ns": int | float, "t1_ns": int | float}
    wrong = [key for key, kind in kinds.items() if not isinstance(event[key], kind)]
    if wrong or not isinstance(event["predicted_ns"], int | float | None):
        key = (*wrong, "predicted_ns")[0]
        raise PlanError(f"{which} has {key} {str(event[key])[:60]}; rank and times are numbers, lane and name strings")


def gantt_svg(results: Iterable[Result], *, width: int = 1200, unit: str = "s") -> str:
    """Compute actions of one or more simulations, one below the other on one scale of time; hover for the action.

    `unit` is that of the costs.
    """
    results = list(results)
    ops = {s.action.op for r in results for s in r.spans}
    legend = {op: name for op, name in _LEGEND.items() if op in ops}
    longest = max((r.makespan_s for r in results), default=0.0) or 1.0
    scale = (width - 60) / longest
    parts: list[str] = []
    for n, (op, name) in enumerate(legend.items()):
        x = 50 + 170 * n
        parts.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{_COLOURS[op]}"/>')
        parts.append(f'<text x="{x + 18}" y="16">{name}</text>')
    y = 26
    for result in results:
        bubble = f"makespan {result.makespan_s:.6g} {unit}, bubble {100 * result.bubble.total:.2f}%"
        parts.append(f'<text x="4" y="{y + 15}" font-weight="bold">{escape(result.name)}: {bubble}</text>')
        y += 22
        for device in range(len(result.peak_bytes)):
            parts.append(f'<text x="4" y="{y + 15}">{device}</text>')
            spans = [s for s in result.spans if s.device == device and s.action.op in COMPUTE]
            parts += [_bar(s, y, scale, unit) for s in spans]
            y += 24
        y += 10
    style = "<style>text{font:12px sans-serif}rect{stroke:#444;stroke-width:.4}</style>"
    # The background is drawn: where a viewer's is dark, black text would not be seen.
    paper = f'<path d="M0 0H{width}V{y}H0z" fill="#fff"/>'
    body = "\n".join(parts)
    size = f'width="{width}" height="{y}" viewBox="0 0 {width} {y}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{paper}\n{body}\n</svg>\n'


def _bar(span: Span, y: int, scale: float, unit: str) -> str:
    x, w = 50 + span.start_s * scale, max((span.end_s - span.start_s) * scale, 0.1)
    title = f"<title>{span.action.label} {span.start_s:.6g} to {span.end_s:.6g} {unit}</title>"
    box = f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="20" fill="{_COLOURS[span.action.op]}">{title}</rect>'
    room = w > 7 * len(str(span.action.microbatch))
    return box + (
        f'<text x="{x + w / 2:.2f}" y="{y + 14}" text-anchor="middle">{span.action.microbatch}</text>' if room else ""
    )
