"""Commands: `python -m moe profile|plan|simulate|trace|netns`.

    torchrun --nproc-per-node 4 -m moe profile --esp 2 --out profile.json
    python -m moe plan --profile profile.json --exchange-bytes 4e6 --expert-rows 4096 --gradient-bytes 3e6
    python -m moe simulate --profile profile.json --exchange-bytes 4e6 --expert-rows 4096 --events predicted.jsonl
    python -m moe trace measured.jsonl --predicted predicted.jsonl --svg lanes.svg --perfetto lanes.json
    python -m moe trace runs/x/trace/experts-00000.jsonl --layer model.layers.0.mlp.experts --way backward --svg a.svg
    sudo python -m moe netns up --inter-mbit 400 --intra-mbit 2000

Exits 0 when all is well, 1 when a check failed, 2 for bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from moe.errors import MoeConfigError, MoeError, PlanError

if TYPE_CHECKING:
    from moe.cost import LayerLoad, Profile

app = typer.Typer(help=__doc__.splitlines()[0] if __doc__ else None, no_args_is_help=True, add_completion=False)
net_app = typer.Typer(help="Two emulated hosts with a slow link between them (Linux, root).", no_args_is_help=True)
app.add_typer(net_app, name="netns")

Made = TypeVar("Made")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ProfileFile = Annotated[Path, typer.Option("--profile", help="What `profile --out` wrote.")]
ExchangeBytes = Annotated[float, typer.Option(help="Bytes of one rank's dispatch buffer, the busiest rank's.")]
ExpertRows = Annotated[float, typer.Option(help="Rows the busiest rank's experts compute.")]
GatherBytes = Annotated[float, typer.Option(help="Bytes the all-gather over shared experts puts out; 0 without.")]
GradientBytes = Annotated[float, typer.Option(help="Dense gradients this layer's backward may hide.")]
SliceBytes = Annotated[float, typer.Option(help="Size of one slice of dense gradients.")]
Name = Annotated[str, typer.Option(help="Keeps several pairs of hosts apart.")]


def main() -> None:
    """Run the command line."""
    try:
        app()
    except (MoeConfigError, PlanError, OSError) as error:
        _fail(str(error), 2)
    except MoeError as error:
        _fail(str(error), 1)


@app.command()
def profile(
    out: Annotated[Path | None, typer.Option(help="Where to write the profile.")] = None,
    esp: Annotated[int, typer.Option(help="Ranks of a host that share each expert; a divisor of the ranks.")] = 1,
    width: Annotated[int, typer.Option(help="Model width of the experts to time.")] = 256,
    inner: Annotated[int, typer.Option(help="Inner width of the experts to time.")] = 512,
    experts: Annotated[int, typer.Option(help="Experts on one rank.")] = 2,
    most_bytes: Annotated[int, typer.Option(help="Largest exchange to measure.")] = 4 << 20,
    most_rows: Annotated[int, typer.Option(help="Most rows to compute.")] = 2048,
    tries: Annotated[int, typer.Option(help="Tries of each size.")] = 7,
    as_json: Json = False,
) -> None:
    """Measure links and experts; run under torchrun, on all ranks alike."""
    from moe.measuring import ExpertShape, profile_here
    from moe.profiler import ProfileConfig

    config = ProfileConfig(most_bytes=most_bytes, most_rows=most_rows, tries=tries)
    rank, found = profile_here(config, esp=esp, experts=ExpertShape(width=width, inner=inner, count=experts))
    if rank:
        return
    if as_json:
        print(found.to_json())
    else:
        print("\n".join(found.describe()))
    if out is not None:
        _write(out, found.to_json())


@app.command()
def plan(
    profile: ProfileFile,
    exchange_bytes: ExchangeBytes,
    expert_rows: ExpertRows,
    gather_bytes: GatherBytes = 0.0,
    gradient_bytes: GradientBytes = 0.0,
    slice_bytes: SliceBytes = float(1 << 20),
    memory_bytes: Annotated[float | None, typer.Option(help="Most bytes of communication buffers.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the plan.")] = None,
    as_json: Json = False,
) -> None:
    """Choose chunks, forward and backward apart, and say why."""
    from moe.planner import plan_layer

    known, load = _read_profile(profile), _load(exchange_bytes, expert_rows, gather_bytes, gradient_bytes, slice_bytes)
    _require_links(known, load, profile)
    made = plan_layer(known, load, memory_bytes=memory_bytes)
    if out is not None:
        _write(out, made.to_json())
    print(made.to_json() if as_json else made)


@app.command()
def simulate(
    profile: ProfileFile,
    exchange_bytes: ExchangeBytes,
    expert_rows: ExpertRows,
    gather_bytes: GatherBytes = 0.0,
    gradient_bytes: GradientBytes = 0.0,
    slice_bytes: SliceBytes = float(1 << 20),
    plan: Annotated[Path | None, typer.Option(help="What `plan --out` wrote; else the plan is made here.")] = None,
    way: Annotated[Literal["forward", "backward"], typer.Option(help="Which direction.")] = "backward",
    events: Annotated[Path | None, typer.Option(help="Where to write the timeline, as JSON lines.")] = None,
    as_json: Json = False,
) -> None:
    """Run a plan in the event simulation and print when each operation runs."""
    from moe.plan import LayerPlan
    from moe.planner import plan_layer
    from moe.simulate import run_plan
    from moe.tracing import from_timeline, write_events

    known, load = _read_profile(profile), _load(exchange_bytes, expert_rows, gather_bytes, gradient_bytes, slice_bytes)
    _require_links(known, load, profile)
    made = _read(LayerPlan.from_json, plan) if plan else plan_layer(known, load)
    backward = way == "backward"
    timeline, afterwards_s = run_plan(known, load, made, backward=backward)
    if events is not None:
        write_events(events, from_timeline(timeline))
    if as_json:
        beside = {"layer_s": known.layer_s, "gradients_afterwards_s": afterwards_s}
        print(json.dumps({"plan": json.loads(made.to_json()), "events": [asdict(e) for e in timeline], **beside}))
        return
    end_s = max((e.t1_s for e in timeline), default=0.0)
    table = Table(title=f"{way}, r = {made.chunks(backward=backward)}, {made.order}: {end_s * 1e3:.2f} ms")
    for column in ("lane", "operation", "from ms", "to ms"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for e in (e for e in timeline if e.t1_s > e.t0_s):  # without shared experts nothing is gathered
        table.add_row(e.lane, f"{e.op.name} {e.op.chunk}", f"{e.t0_s * 1e3:.2f}", f"{e.t1_s * 1e3:.2f}")
    Console().print(table)
    for name, more_s in (("the executor itself", known.layer_s), ("gradients left for afterwards", afterwards_s)):
        if more_s:
            print(f"{name}: {more_s * 1e3:.2f} ms more")
    print(f"{way} in all: {(end_s + known.layer_s + afterwards_s) * 1e3:.2f} ms")


@app.command()
def trace(
    measured: Annotated[Path, typer.Argument(help="Events as JSON lines.")],
    predicted: Annotated[Path | None, typer.Option(help="What `simulate --events` wrote.")] = None,
    perfetto: Annotated[Path | None, typer.Option(help="Write this, for ui.perfetto.dev.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write this picture.")] = None,
    rank: Annotated[int, typer.Option(help="Whose lanes to draw.")] = 0,
    layer: Annotated[str | None, typer.Option(help="Only this layer, by its name.")] = None,
    way: Annotated[Literal["forward", "backward"] | None, typer.Option(help="Only this direction.")] = None,
    mb: Annotated[int | None, typer.Option(help="Only this pass of a layer in a direction, from 0.")] = None,
    as_json: Json = False,
) -> None:
    """Put a predicted timeline over a measured one."""
    from moe import tracing

    if perfetto is None and svg is None:
        raise MoeConfigError("nothing to write; give --perfetto FILE, --svg FILE or both")
    events = tracing.chosen(tracing.read_events(measured), layer=layer, way=way, mb=mb)
    plan_events = tracing.read_events(predicted) if predicted else []
    if svg is not None and rank not in {e.rank for e in events}:
        raise MoeConfigError(
            f"{measured} has no events of rank {rank}; it has ranks {sorted({e.rank for e in events})}"
        )
    if perfetto is not None:
        perfetto.write_text(json.dumps(tracing.perfetto(events, plan_events)))
    if svg is not None:
        tracing.draw(svg, events, plan_events, rank=rank)
    written = [str(p) for p in (perfetto, svg) if p is not None]
    print(json.dumps({"events": len(events), "written": written}) if as_json else f"wrote {' and '.join(written)}")


@net_app.command("up")
def netns_up(name: Name = "moe", inter_mbit: float = 400.0, intra_mbit: float = 2000.0, as_json: Json = False) -> None:
    """Make the two hosts; processes of rank r run with `ip netns exec`, GLOO_SOCKET_IFNAME set as printed."""
    from moe.netns import TwoHosts, up

    net = TwoHosts(name=name, inter_mbit=inter_mbit, intra_mbit=intra_mbit)
    up(net)
    facts = {"hosts": net.hosts, "addresses": net.addresses, "interface": net.interface}
    if as_json:
        print(json.dumps(facts))
        return
    for host, address in zip(net.hosts, net.addresses, strict=True):
        print(f"{address}  ip netns exec {host} env GLOO_SOCKET_IFNAME={net.interface} COMMAND")


@net_app.command("down")
def netns_down(name: Name = "moe", as_json: Json = False) -> None:
    """Remove the two hosts."""
    from moe.netns import TwoHosts, down

    removed = down(TwoHosts(name=name))
    print(json.dumps({"removed": removed}) if as_json else "removed" if removed else f"no hosts named {name}")


def _fail(text: str, code: int) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def _read_profile(path: Path) -> Profile:
    from moe.cost import Profile

    return _read(Profile.from_json, path)


def _read(from_json: Callable[[str], Made], path: Path) -> Made:
    text = path.read_text(encoding="utf-8", errors="replace")  # what is no text is no JSON either, and said to be none
    try:
        return from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        print(text)  # measuring it took a while
        raise MoeConfigError(f"{error}; what was to be written there is printed instead") from error


def _load(exchange: float, rows: float, gather: float, gradient: float, part: float) -> LayerLoad:
    from moe.cost import LayerLoad

    return LayerLoad(
        exchange_bytes=exchange, gather_bytes=gather, expert_rows=rows, gradient_bytes=gradient, slice_bytes=part
    )


def _require_links(known: Profile, load: LayerLoad, path: Path) -> None:
    from moe.cost import FREE

    if load.gather_bytes and FREE in (known.all_gather, known.reduce_scatter):
        raise MoeConfigError(
            f"gather_bytes is {load.gather_bytes:g}, but {path} was measured without ranks that share experts; leave "
            "it out, or measure with --esp 2 or more"
        )
