"""The part `emulated` of `benchmarks.pipeline`: RoundPipe's runtime on emulated devices, its simulation, and peers.

One process a device, the real runtime (shared memory, words, uploads, host optimizer), and a calibrated wait in the
place of every computation, as long as the published cost tables say, longer where one would be below 10 ms. Two
micro-batches a device. An asynchronous step is one among many (see `STEPS`), and beside it one of a run's first few.
Peers are simulated (`benchmarks.pipeline_peers`), which is a little better than what they would run: with recomputation
in every stage, and, beside it, in all but the last. Run it with nothing else on the machine.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim
from benchmarks.moe_claims import at_least, at_most
from benchmarks.pipeline_options import Options
from benchmarks.pipeline_peers import best_peers
from benchmarks.pipeline_plans import PlanFile
from benchmarks.pipeline_tables import Model, read_models
from launch.env import end_with_parent
from pipeline.actions import COMPUTE
from pipeline.costs import Costs
from pipeline.roundpipe.compute import WaitCompute
from pipeline.roundpipe.emulate import BOUNDARY_BYTES, emulated_layers, waits
from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import exchange_pids, open_store
from pipeline.roundpipe.lowering import completed
from pipeline.roundpipe.optimizer import HostOptimizer
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.planner import RoundPipePlan, evaluate
from pipeline.roundpipe.search import Problem
from pipeline.roundpipe.slots import LayerCosts
from pipeline.roundpipe.worker import SlotWorker
from pipeline.schedule import Schedule
from pipeline.simulate import duration, simulate
from pipeline.tracing import Trace

PART = "emulated"
MODES = ("synchronous", "asynchronous")
SHORTEST_S = 0.010
STEPS = 4
"""Of an asynchronous run. From the second's end to the last's is what a step of a long run takes: the first steps fill
the pipeline, and steps alternate where the number of slots is no multiple of the devices."""
WITHIN = 0.03
RANK_TIMEOUT_S = 120.0


def scaled(model: Model, found: RoundPipePlan) -> Costs:
    """Return the table's costs, which are milliseconds, in seconds: all longer where a plan's shortest is too short."""
    costs = Costs(forward_s=(model.costs.forward_s,), backward_s=(model.costs.backward_s,))
    schedule = found.schedule()
    shortest = min(duration(schedule, a, costs) for row in schedule.devices for a in row if a.op in COMPUTE)
    factor = max(1e-3, SHORTEST_S / shortest)
    rows = [tuple(factor * t for t in row) for row in (model.costs.forward_s, model.costs.backward_s)]
    return Costs(forward_s=(rows[0],), backward_s=(rows[1],))


def rank_runs(rank: int, folder: str, schedule: Schedule, found: RoundPipePlan, costs: Costs, repeats: int) -> list:
    """Return when this device's first action began, and when its last of each step ended, of each repeat."""
    torch.set_num_threads(1)
    ranks = schedule.num_devices
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    layers = emulated_layers(costs.num_layers)
    host = plan_host(
        layers,
        found.partition,
        ranks=ranks,
        microbatches=schedule.num_microbatches // schedule.steps,
        boundary_bytes=BOUNDARY_BYTES,
        staleness=schedule.staleness,
    )
    store = open_store(host, dist.group.WORLD)
    peers = Peers(store, exchange_pids(dist.group.WORLD), rank=rank, timeout_s=RANK_TIMEOUT_S)
    optimizer = HostOptimizer(store, peers, lambda ps: torch.optim.SGD(ps.values(), lr=0.0), clip_norm=None, trace=None)
    trace, times = Trace(rank), []
    compute = WaitCompute(waits(schedule, costs), costs.num_layers)
    worker = SlotWorker(layers, store, peers, compute=compute, trace=trace, optimizer=optimizer)
    for _ in range(repeats + 1):  # the first warms up
        dist.barrier()
        trace.clear()
        worker.run(schedule)
        own = [event for event in trace.events if event.lane == "compute"]
        ends = [max((e.t1_ns for e in own if e.step == step), default=0) for step in range(schedule.steps)]
        times.append((min(e.t0_ns for e in own), ends))
    worker.close()
    dist.destroy_process_group()
    return times[1:]


def _serve(connection: Connection, *arguments: Any) -> None:
    end_with_parent()
    try:
        connection.send(rank_runs(*arguments))
    except BaseException:  # noqa: BLE001  (told to the parent, which raises)
        connection.send(traceback.format_exc())


def run_devices(
    schedule: Schedule, found: RoundPipePlan, costs: Costs, repeats: int, *, deadline_s: float
) -> list[list[float]]:
    """Return when every step ended, in seconds from the beginning, of every repeat."""
    context = multiprocessing.get_context("fork")  # torch is loaded already
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        for rank in range(schedule.num_devices):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, folder, schedule, found, costs, repeats), daemon=True
            )
            process.start()
            ends.append((ours, process))
        answers: list[Any] = [ours.recv() if ours.poll(deadline_s) else "a rank did not answer" for ours, _ in ends]
        for _, process in ends:
            process.join(10)
            process.kill()
    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        raise RuntimeError(failed[0])
    runs = [([a[k][0] for a in answers], [a[k][1] for a in answers]) for k in range(repeats)]
    return [[(max(of_step) - min(begun)) / 1e9 for of_step in zip(*ends, strict=True)] for begun, ends in runs]


def predicted_ends(schedule: Schedule, costs: Costs) -> list[float]:
    """Return when every step ends in the simulator."""
    ends = [0.0] * schedule.steps
    for span in simulate(schedule, costs).spans:
        if span.action.op in COMPUTE:
            step = schedule.step(span.action.microbatch or 0)
            ends[step] = max(ends[step], span.end_s)
    return ends


def of_a_long_run(ends: Sequence[float]) -> float:
    """Return the seconds of one step among many, see `STEPS`; of a single step, its own."""
    return ends[0] if len(ends) == 1 else (ends[-1] - ends[1]) / (len(ends) - 2)


def find_plan(model: Model, devices: int, plans: PlanFile, *, effort: float, asynchronous: bool) -> RoundPipePlan:
    """Return the plan of one step; for an asynchronous run the one of which several steps in a row are shortest."""
    costs = LayerCosts(forward_s=model.costs.forward_s, backward_s=model.costs.backward_s)
    num = 2 * devices
    found = plans.plan(costs, num_devices=devices, num_microbatches=num, effort=effort)
    if not asynchronous:
        return found
    # Steps that do not wait for the optimizer follow each other as rounds do.
    row = plans.plan(
        costs, num_devices=devices, num_microbatches=num * STEPS, num_rounds=[STEPS], open_slots=[1], effort=effort
    )
    alone = Problem(costs=costs, rounds=(num,), num_devices=devices, open_slots=1)
    general = Costs(forward_s=(costs.forward_s,), backward_s=(costs.backward_s,))

    def seconds(candidate: RoundPipePlan) -> float:
        return of_a_long_run(predicted_ends(completed(candidate.schedule(steps=STEPS, staleness=1)), general))

    return min(found, evaluate(alone, row.partition), key=seconds)


def find_peer(costs: Costs, devices: int, plans: PlanFile, *, keep_last: bool) -> tuple[float, str]:
    """Return the simulated makespan of the better peer, and which it is."""

    def search() -> list[Any]:
        best = best_peers(costs, devices=devices, microbatches=2 * devices, keep_last=keep_last)[0]
        return [best.makespan_s, f"{best.name}, {len(best.bounds)} stages"]

    seconds, name = plans.kept({"peer": costs.to_json(), "devices": devices, "keep_last": keep_last}, search)
    return seconds, name


def measure(model: Model, devices: int, plans: PlanFile, *, repeats: int, effort: float, mode: str) -> dict[str, Any]:
    """Return one row."""
    microbatches, asynchronous = 2 * devices, mode == "asynchronous"
    found = find_plan(model, devices, plans, effort=effort, asynchronous=asynchronous)
    costs = scaled(model, found)
    steps = STEPS if asynchronous else 1
    schedule = completed(found.schedule(steps=steps, staleness=int(asynchronous)))
    predicted = predicted_ends(schedule, costs)
    deadline_s = 2 * (RANK_TIMEOUT_S + (repeats + 1) * predicted[-1])
    runs = run_devices(schedule, found, costs, repeats, deadline_s=deadline_s)
    table = Costs(forward_s=(model.costs.forward_s,), backward_s=(model.costs.backward_s,))
    factor = costs.forward_s[0][0] / model.costs.forward_s[0]
    peer_s, which = find_peer(table, devices, plans, keep_last=False)
    keeping_s, keeping = find_peer(table, devices, plans, keep_last=True)
    peer_s, keeping_s = factor * peer_s, factor * keeping_s
    again = sum(costs.forward_s[0][: sum(found.partition.backward)])
    floor_s = (sum(costs.forward_s[0]) + sum(costs.backward_s[0]) + again) * microbatches / devices
    measured_s, whole_s = statistics.median(map(of_a_long_run, runs)), statistics.median(run[-1] for run in runs)
    return {
        "part": PART,
        "model": model.name,
        "devices": devices,
        "mode": mode,
        "step_s": measured_s,
        "predicted_step_s": of_a_long_run(predicted),
        "excess": whole_s / predicted[-1] - 1,
        "excess_of_each": [run[-1] / predicted[-1] - 1 for run in runs],
        "peer_step_s": peer_s,
        "peer": which,
        "speedup": peer_s / measured_s,
        "simulated": peer_s / of_a_long_run(predicted),
        "first_steps": peer_s * steps / whole_s,
        "bound": peer_s / floor_s,
        "keeping_peer": keeping,
        "keeping_speedup": keeping_s / measured_s,
        "keeping_bound": keeping_s / floor_s,
        "slots": found.partition.num_slots,
        "rounds": list(found.rounds),
        "open_slots": found.open_slots,
    }


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Return the claims that the rows are enough for."""
    claims = []
    for n in sorted({row["devices"] for row in rows}):
        here = [abs(row["excess"]) for row in rows if row["devices"] == n and row["mode"] == "synchronous"]
        if here:
            name, note = f"emulated run against simulation, {n} devices", f"worst of {len(here)} models, medians"
            claims.append(at_most(name, max(here), WITHIN, "share", 0.0, f"{note} (emulated)"))
    for mode, mean_target in (("synchronous", 1.12), ("asynchronous", 1.22)):
        eight = [row for row in rows if row["devices"] == 8 and row["mode"] == mode]
        for kind, what in (("", "the better peer"), ("keeping_", "the better peer, which keeps its last stage's")):
            if eight:
                claims += _against(eight, f"{mode}, 8 devices, against {what}", mean_target, kind)
        if eight and mode == "asynchronous":
            first, bound = (statistics.mean(row[key] for row in eight) for key in ("first_steps", "bound"))
            name, note = f"asynchronous, 8 devices, the first {STEPS} steps of a run", "filling included"
            claims.append(at_least(f"{name}, on average", first, mean_target, "x", bound, note))
    return claims


def _against(rows: Sequence[dict[str, Any]], name: str, mean_target: float, kind: str) -> list[Claim]:
    """Return the claims of one mode; `kind` is how the columns of a peer begin."""
    speedups, bounds = [row[f"{kind}speedup"] for row in rows], [row[f"{kind}bound"] for row in rows]
    note = f"{len(rows)} models; peers are simulated; the bound is the zero-bubble step"
    mean, bound = statistics.mean(speedups), statistics.mean(bounds)
    claims = [at_least(f"{name}, on average", mean, mean_target, "x", bound, note)]
    if rows[0]["mode"] == "synchronous":
        claims.append(at_least(f"{name}, at best", max(speedups), 1.20, "x", max(bounds), note))
    return claims


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="emulated devices: the real runtime, waits for computation; the bound is the zero-bubble step")
    for column in ("model", "devices", "mode"):
        table.add_column(column)
    for column in ("step s", "simulated", "excess", "peer", "peer step s", "speed-up", "simulated", "bound",
                   "first steps", "over one that\nkeeps its last", "bound of\nthat", "slots", "open"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["model"], str(row["devices"]), row["mode"], f"{row['step_s']:.3f}", f"{row['predicted_step_s']:.3f}",
            f"{row['excess']:+.1%}", row["peer"], f"{row['peer_step_s']:.3f}", f"{row['speedup']:.3f}",
            f"{row['simulated']:.3f}", f"{row['bound']:.3f}", f"{row['first_steps']:.3f}",
            f"{row['keeping_speedup']:.3f}", f"{row['keeping_bound']:.3f}", str(row["slots"]), str(row["open_slots"]),
        )  # fmt: skip
    Console(width=170).print(table)


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure what is asked for; yield rows as they come."""
    models = [m for m in read_models() if not options.models or m.name in options.models]
    devices, modes, effort = options.devices or (2, 4, 8), options.modes or MODES, options.effort
    if options.quick:
        models, devices, modes, effort = models[:1], [2], MODES[:1], 0.02
    for model in models:
        for n in devices:
            for mode in modes:
                if mode == "synchronous" or n == 8:
                    row = measure(model, n, options.plans, repeats=options.rounds or 3, effort=effort, mode=mode)
                    show([row])
                    yield row
