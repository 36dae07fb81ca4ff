"""Schedules from the command line, without a GPU and without launching anything.

    python -m pipeline show 1f1b --ranks 4 --microbatches 8
    python -m pipeline simulate zbv --ranks 4 --microbatches 8 --costs costs.json --memory-cap 24GiB --json
    python -m pipeline compare --ranks 8 --microbatches 16 --costs costs.json --svg compare.svg
    python -m pipeline plan --ranks 8 --microbatches 16 --costs costs.json
    python -m pipeline trace 1f1b --ranks 4 --microbatches 8 --out trace.json --measured events.jsonl

SCHEDULE is a name or a file (.json, .txt, or .csv of torch.distributed.pipelining). Exit 0: well; 1: a check failed;
2: bad input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import named
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PipelineError, PlanError
from pipeline.render import gantt_svg, perfetto, trace_events
from pipeline.result import Result
from pipeline.schedule import MOST_LAYERS, MOST_MICROBATCHES, Schedule
from pipeline.schedules import SCHEDULES
from pipeline.simulate import simulate as run
from pipeline.torch_csv import dump_csv
from pipeline.validate import validate

app = typer.Typer(
    help="Pipeline schedules: show, simulate, compare and trace them, without launching anything.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_NAMES = ", ".join(SCHEDULES)
Name = Annotated[str, typer.Argument(metavar="SCHEDULE", help=f"One of {_NAMES}; or a .json, .txt or .csv file.")]
Ranks = Annotated[int, typer.Option(min=1, max=MOST_LAYERS, help="Devices.")]
Microbatches = Annotated[int, typer.Option(min=1, max=MOST_MICROBATCHES, help="Micro-batches of one step.")]
Stages = Annotated[
    int | None, typer.Option(min=1, max=MOST_LAYERS, help="Stages over all ranks; for roundpipe without costs, layers.")
]
CostsFile = Annotated[Path | None, typer.Option("--costs", help="Costs as JSON; without, every layer is 1 + 2 s.")]
Recompute = Annotated[bool, typer.Option(help="Recompute activations before each backward.")]
Rounds = Annotated[int, typer.Option(min=1, help="RoundPipe: passes of the micro-batches of a step.")]
OpenSlots = Annotated[int, typer.Option(min=1, help="RoundPipe: slots open on a device; above 1, ready first.")]
Cap = Annotated[str | None, typer.Option("--memory-cap", help="Bytes a device may hold; 24GiB, 512MiB or a number.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@contextmanager
def _exits(code: int) -> Iterator[None]:
    try:
        yield
    except PipelineError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2 if isinstance(e, PlanError) else code) from e


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?(?:e\d{1,2})?)\s*(|KiB|MiB|GiB)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write 24GiB, 512MiB, 64KiB or 25769803776")
    return float(match[1]) * _UNITS[match[2]]


def _costs(path: Path | None, cap: float | None = None) -> Costs | None:
    """The costs of a file; with a memory cap they have to say something of bytes, or every cap would hold."""
    try:
        costs = None if path is None else Costs.from_json(path.read_text())
    except (OSError, ValueError, TypeError, RecursionError) as e:
        typer.echo(f"error: cannot read costs from {path}: {e}", err=True)
        raise typer.Exit(2) from e
    if cap is not None and (costs is None or not costs.count_bytes):
        raise typer.BadParameter("needs --costs with weight_bytes or activation_bytes", param_hint="--memory-cap")
    return costs


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as e:
        typer.echo(f"error: cannot write {path}: {e.strerror}", err=True)
        raise typer.Exit(2) from e


def _schedule(name: str, costs: Costs | None, **settings: Any) -> Schedule:
    """A schedule of compute actions by name, or from a file as it is there."""
    with _exits(2):
        if Path(name).suffix in (".json", ".csv", ".txt"):
            return named.read_schedule(Path(name))
        return named.named_schedule(name, costs=costs, **settings)


def _whole(schedule: Schedule) -> Schedule:
    """Completed with transfers, unless it has some already."""
    with _exits(1):
        validate(schedule)
        has = {a.op.value for row in schedule.devices for a in row} & {"SEND", "RECV", "PUT", "GET", "UPLOAD"}
        return schedule if has else complete(schedule)


def _simulated(schedule: Schedule, costs: Costs | None, cap: float | None) -> Result:
    costs = costs or Costs.uniform(schedule.num_layers)
    with _exits(1):
        validate(schedule, costs=costs, memory_cap_bytes=cap)
        return run(schedule, costs)


@app.command()
def show(
    schedule: Name,
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    stages: Stages = None,
    costs: CostsFile = None,
    recompute: Recompute = False,
    rounds: Rounds = 1,
    open_slots: OpenSlots = 1,
    transfers: Annotated[bool, typer.Option(help="With messages and host transfers.")] = False,
    form: Annotated[str, typer.Option(help="table, text, json, or csv of torch.distributed.pipelining.")] = "table",
) -> None:
    """Print a schedule: positions down, devices across."""
    settings = {"devices": ranks, "microbatches": microbatches, "stages": stages, "recompute": recompute}
    found = _schedule(schedule, _costs(costs), **settings, rounds=rounds, open_slots=open_slots)
    found = _whole(found) if transfers else found
    forms = {
        "table": lambda: found.table(),
        "text": lambda: found.to_text().rstrip("\n"),
        "json": lambda: json.dumps(found.to_json()),
        "csv": lambda: dump_csv(found).rstrip("\n"),
    }
    if form not in forms:
        raise typer.BadParameter(f"{form!r} is none of {', '.join(forms)}", param_hint="--form")
    with _exits(2):
        typer.echo(forms[form]())


@app.command()
def simulate(
    schedule: Name,
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    stages: Stages = None,
    costs: CostsFile = None,
    recompute: Recompute = False,
    rounds: Rounds = 1,
    open_slots: OpenSlots = 1,
    memory_cap: Cap = None,
    svg: Annotated[Path | None, typer.Option(help="Write a Gantt chart here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a schedule by its costs: makespan, useful share, bubble and its parts, peak bytes. Exit 1 over the cap."""
    cap = _bytes(memory_cap)
    read = _costs(costs, cap)
    settings = {"devices": ranks, "microbatches": microbatches, "stages": stages, "recompute": recompute}
    found = _whole(_schedule(schedule, read, **settings, rounds=rounds, open_slots=open_slots))
    result = _simulated(found, read, cap)
    if svg is not None:
        _write(svg, gantt_svg([result]))
    if as_json:
        typer.echo(json.dumps(result.to_json()))
        return
    _print([("", result)])
    path = result.critical_path
    typer.echo(
        "critical path: " + " ".join(f"{s.action.label}@{s.device}" for s in path[:12]) + " ..." * (len(path) > 12)
    )


@app.command()
def compare(
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    costs: CostsFile = None,
    recompute: Recompute = False,
    rounds: Rounds = 1,
    open_slots: OpenSlots = 1,
    layers: Annotated[
        int | None, typer.Option(min=1, max=MOST_LAYERS, help="Without costs: equal layers of 1 + 2 s.")
    ] = None,
    memory_cap: Cap = None,
    svg: Annotated[Path | None, typer.Option(help="Write Gantt charts on one scale of time here.")] = None,
    as_json: AsJson = False,
) -> None:
    """All schedules on one model: a table and, with --svg, a picture. Those that do not fit are listed with why."""
    cap = _bytes(memory_cap)
    if costs is not None and layers is not None:
        raise typer.BadParameter("the layers are those of --costs; leave one of the two out", param_hint="--layers")
    read = _costs(costs, cap) or Costs.uniform(layers or 2 * ranks)
    results, refused = [], {}
    for name in SCHEDULES:
        own: dict[str, Any] = {"rounds": rounds, "open_slots": open_slots} if name == "roundpipe" else {}
        own = own or {"recompute": recompute}
        try:
            found = complete(named.named_schedule(name, devices=ranks, microbatches=microbatches, costs=read, **own))
            validate(found, costs=read, memory_cap_bytes=cap)
            results.append(run(found, read))
        except PipelineError as e:
            refused[name] = str(e).splitlines()[0]
    results.sort(key=lambda r: r.makespan_s)
    if svg is not None:
        _write(svg, gantt_svg(results))
    if as_json:
        typer.echo(json.dumps({"results": [r.to_json() for r in results], "refused": refused}))
    else:
        if results:
            best = results[0].makespan_s
            _print([(f"{best / r.makespan_s if best else 1:.3f}", r) for r in results])
        for name, why in refused.items():
            typer.echo(f"{name}: {why}")
    if not results:
        raise typer.Exit(1)


@app.command()
def trace(
    schedule: Name,
    out: Annotated[Path, typer.Option(help="Perfetto JSON goes here.")],
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    stages: Stages = None,
    costs: CostsFile = None,
    recompute: Recompute = False,
    rounds: Rounds = 1,
    open_slots: OpenSlots = 1,
    measured: Annotated[Path | None, typer.Option(help="Trace events of a run (JSON lines), shown below.")] = None,
) -> None:
    """Write a trace for ui.perfetto.dev: the simulation, and a measured run under it."""
    read = _costs(costs)
    settings = {"devices": ranks, "microbatches": microbatches, "stages": stages, "recompute": recompute}
    found = _whole(_schedule(schedule, read, **settings, rounds=rounds, open_slots=open_slots))
    runs = {"predicted": trace_events(found, _simulated(found, read, None))}
    if measured is not None:
        try:
            runs["measured"] = [json.loads(line) for line in measured.read_text().splitlines() if line.strip()]
        except (OSError, ValueError, RecursionError) as e:
            typer.echo(f"error: cannot read events from {measured}: {e}", err=True)
            raise typer.Exit(2) from e
    with _exits(2):
        _write(out, json.dumps(perfetto(runs)))
    typer.echo(f"{sum(map(len, runs.values()))} events in {out}; open it at ui.perfetto.dev")


@app.command()
def plan(
    costs: CostsFile = None,
    ranks: Ranks = 4,
    microbatches: Annotated[
        list[int],
        typer.Option(min=1, help="Micro-batches of one step; again for other numbers to try. Costs are of the first."),
    ] = [8],  # noqa: B006  (typer's own form)
    stages: Annotated[
        int | None,
        typer.Option(
            "--layers", "--stages", min=2, max=MOST_LAYERS, help="Without costs; the head is one. 17 if not given."
        ),
    ] = None,
    memory_cap: Cap = None,
    effort: Annotated[float, typer.Option(min=0.001, help="Of the search; 1 is some seconds.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Choose RoundPipe's partition, fused layers, micro-batches, rounds and open slots, and say why."""
    # Compiling takes seconds, which the other commands need not pay.
    from pipeline.roundpipe.plan_cli import print_plan

    if costs is not None and stages is not None:
        raise typer.BadParameter("the layers are those of --costs; leave one of the two out", param_hint="--layers")
    cap = _bytes(memory_cap)
    profile = _costs(costs, cap) or Costs.uniform(stages or 17)
    with _exits(2):
        print_plan(
            profile, devices=ranks, microbatches=microbatches, memory_cap_bytes=cap, effort=effort, as_json=as_json
        )


def _print(rows: list[tuple[str, Result]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = "schedule,makespan,of best,useful,bubble,fill,switch,drain,imbalance,transfer,peak bytes"
    table = Table(*shown.split(","), box=None)
    for relative, r in rows:
        b = r.bubble
        shares = (r.useful, b.total, b.fill, b.switch, b.drain, b.imbalance, b.transfer)
        percent = [f"{100 * share:.2f}%" for share in shares]
        table.add_row(r.name, f"{r.makespan_s:.6g}", relative, *percent, f"{max(r.peak_bytes):,.0f}")
    Console(width=140).print(table)
