"""Schedules from the command line, without a GPU and without launching anything.

    python -m pipeline show 1f1b --ranks 4 --microbatches 8
    python -m pipeline simulate zbv --ranks 4 --microbatches 8 --costs costs.json --memory-cap 24GiB --json
    python -m pipeline compare --ranks 8 --microbatches 16 --costs costs.json --svg compare.svg
    python -m pipeline plan --ranks 8 --microbatches 16 --costs costs.json
    python -m pipeline trace 1f1b --ranks 4 --microbatches 8 --out trace.json --measured events.jsonl

SCHEDULE is a name or a file: .json (also what `plan --json` prints), .txt, or .csv of torch.distributed.pipelining.
Exit 0: well; 1: a check failed (a schedule that is not valid, a cap that is passed, no plan within one); 2: bad input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cap import over_cap
from pipeline.cli_input import (
    MICROBATCHES,
    RANKS,
    Asked,
    exits,
    is_file,
    named_schedule,
    num_bytes,
    read_costs,
    read_events,
    schedule_of,
    whole,
)
from pipeline.cli_output import print_json, print_path, print_results, unit_of, waiting, write
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PipelineError
from pipeline.listing import listing
from pipeline.render import gantt_svg, perfetto, trace_events
from pipeline.result import Result
from pipeline.schedule import MOST_LAYERS, MOST_MICROBATCHES
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
Name = Annotated[
    str,
    typer.Argument(
        metavar="SCHEDULE", help=f"One of {_NAMES}; or a file: .json (also of `plan --json`), .txt or .csv."
    ),
]
Ranks = Annotated[int | None, typer.Option(min=1, max=MOST_LAYERS, help=f"Devices; {RANKS} unless given.")]
Microbatches = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_MICROBATCHES, help=f"Micro-batches of one step; {MICROBATCHES} unless given."),
]
Stages = Annotated[
    int | None, typer.Option(min=1, max=MOST_LAYERS, help="Stages over all ranks; for roundpipe without costs, layers.")
]
CostsFile = Annotated[
    Path | None, typer.Option("--costs", help="Costs as JSON, in seconds; without, every layer is 1 + 2 units.")
]
Recompute = Annotated[
    bool | None, typer.Option(help="Recompute activations before each backward; roundpipe always does.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="RoundPipe: passes of the micro-batches of a step; 1.")]
OpenSlots = Annotated[
    int | None, typer.Option(min=1, help="RoundPipe: slots open on a device; above 1, ready first. 1 unless given.")
]
Cap = Annotated[str | None, typer.Option("--memory-cap", help="Bytes a device may hold; 24GiB, 512MiB or a number.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(
    schedule: Name,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    stages: Stages = None,
    costs: CostsFile = None,
    recompute: Recompute = None,
    rounds: Rounds = None,
    open_slots: OpenSlots = None,
    transfers: Annotated[bool, typer.Option(help="With messages and host transfers.")] = False,
    form: Annotated[str, typer.Option(help="table, text, json, or csv of torch.distributed.pipelining.")] = "table",
) -> None:
    """Print a schedule: positions down, devices across."""
    if costs is not None and is_file(schedule):
        raise typer.BadParameter("the schedule of a file is cut already; leave it out", param_hint="--costs")
    found = schedule_of(schedule, read_costs(costs), Asked(ranks, microbatches, stages, recompute, rounds, open_slots))
    found = whole(found) if transfers else found
    forms = {
        "table": lambda: found.table(),
        "text": lambda: found.to_text().rstrip("\n"),
        "json": lambda: json.dumps(found.to_json()),
        "csv": lambda: dump_csv(found).rstrip("\n"),
    }
    if form not in forms:
        raise typer.BadParameter(f"{form!r} is none of {', '.join(forms)}", param_hint="--form")
    with exits(2):
        typer.echo(forms[form]())


@app.command()
def simulate(
    schedule: Name,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    stages: Stages = None,
    costs: CostsFile = None,
    recompute: Recompute = None,
    rounds: Rounds = None,
    open_slots: OpenSlots = None,
    memory_cap: Cap = None,
    svg: Annotated[Path | None, typer.Option(help="Write a Gantt chart here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a schedule by its costs: makespan, useful share, bubble and its parts, peak bytes. Exit 1 over the cap."""
    cap = num_bytes(memory_cap)
    read = read_costs(costs, cap)
    asked = Asked(ranks, microbatches, stages, recompute, rounds, open_slots)
    found = whole(schedule_of(schedule, read, asked))
    numbers, unit = read or Costs.uniform(found.num_layers), unit_of(read)
    with exits(1):
        result = run(found, numbers)
    actions = listing(found)
    over = None if cap is None else over_cap(actions, numbers, result, cap)
    if svg is not None:
        write(svg, gantt_svg([result], unit=unit))
    if as_json:
        verdict = {} if cap is None else {"memory_cap": cap, "over_cap": over is not None, "reason": over and over.text}
        print_json({**result.to_json(), "unit": unit, **verdict})
    else:
        print_results([result], unit)
        print_path(result)
    if over is not None:
        typer.echo(f"error: {actions.fail(over.action, over.text)}", err=True)
        raise typer.Exit(1)


@app.command()
def compare(
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    costs: CostsFile = None,
    recompute: Recompute = None,
    rounds: Rounds = None,
    open_slots: OpenSlots = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=MOST_LAYERS, help="Without costs: equal layers of 1 + 2 units.")
    ] = None,
    memory_cap: Cap = None,
    svg: Annotated[Path | None, typer.Option(help="Write Gantt charts on one scale of time here.")] = None,
    as_json: AsJson = False,
) -> None:
    """All schedules on one model: a table and, with --svg, a picture. Those that do not fit are listed with why."""
    cap = num_bytes(memory_cap)
    if costs is not None and layers is not None:
        raise typer.BadParameter("the layers are those of --costs; leave one of the two out", param_hint="--layers")
    read, devices = read_costs(costs, cap), ranks or RANKS
    numbers, unit = read or Costs.uniform(layers or 2 * devices), unit_of(read)
    bound = Asked(devices, microbatches, None, recompute, None, None)
    streamed = Asked(devices, microbatches, None, None, rounds, open_slots)
    results, refused = [], {}
    for name in SCHEDULES:
        found = _fitting(name, numbers, streamed if name == "roundpipe" else bound, cap)
        if isinstance(found, Result):
            results.append(found)
        else:
            refused[name] = found
    results.sort(key=lambda r: r.makespan_s)
    if svg is not None:
        write(svg, gantt_svg(results, unit=unit))
    if as_json:
        print_json({"unit": unit, "results": [r.to_json() for r in results], "refused": refused})
    else:
        if results:
            print_results(results, unit, compared=True)
        for name, why in refused.items():
            typer.echo(f"{name}: {why}")
    if not results:
        raise typer.Exit(1)


def _fitting(name: str, costs: Costs, asked: Asked, cap: float | None) -> Result | str:
    """Simulate a schedule; why not, in words, where it cannot be or passes the cap."""
    try:
        found = complete(named_schedule(name, costs, asked))
        validate(found)
        result = run(found, costs)
    except PipelineError as e:
        return str(e).splitlines()[0]
    over = None if cap is None else over_cap(listing(found), costs, result, cap)
    return result if over is None else over.text


@app.command()
def trace(
    schedule: Name,
    out: Annotated[Path, typer.Option(help="Perfetto JSON goes here.")],
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    stages: Stages = None,
    costs: CostsFile = None,
    recompute: Recompute = None,
    rounds: Rounds = None,
    open_slots: OpenSlots = None,
    measured: Annotated[
        Path | None, typer.Option(help="Trace events of a run, shown below: JSON lines, or a run's folder trace/.")
    ] = None,
) -> None:
    """Write a trace for ui.perfetto.dev: the simulation, and a measured run under it."""
    read = read_costs(costs)
    found = whole(schedule_of(schedule, read, Asked(ranks, microbatches, stages, recompute, rounds, open_slots)))
    with exits(1):
        runs = {"predicted": trace_events(found, run(found, read or Costs.uniform(found.num_layers)))}
    if measured is not None:
        runs["measured"] = read_events(measured)
    with exits(2):
        write(out, json.dumps(perfetto(runs)))
    typer.echo(f"{sum(map(len, runs.values()))} events in {out}; open it at ui.perfetto.dev")


@app.command()
def plan(
    costs: Annotated[Path | None, typer.Option(help="Costs as JSON; without, every layer is 1 + 2 units.")] = None,
    ranks: Annotated[int, typer.Option(min=1, max=MOST_LAYERS, help="Devices.")] = RANKS,
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
    """Choose RoundPipe's partition, fused layers, micro-batches, rounds and open slots, and say why.

    Exit 1 where no plan keeps the cap.
    """
    if costs is not None and stages is not None:
        raise typer.BadParameter("the layers are those of --costs; leave one of the two out", param_hint="--layers")
    cap = num_bytes(memory_cap)
    read = read_costs(costs, cap)
    profile, unit = read or Costs.uniform(stages or 17), unit_of(read)
    with waiting("searching for a plan"):
        # Compiling takes seconds, which the other commands need not pay.
        from pipeline.roundpipe.plan_cli import as_text, find_plan, layers_of

        with exits(2):
            layers = layers_of(profile, microbatches[0])
        with exits(1, plan=1):
            found = find_plan(
                layers, devices=ranks, microbatches=microbatches, memory_cap_bytes=cap, effort=effort, unit=unit
            )
    if as_json:
        print_json(found.to_json())
    else:
        typer.echo(as_text(found, profile, unit))
