"""RoundPipe's runtime on emulated devices, against its simulation and the simulated peers.

    python -m benchmarks.roundpipe_emulated [--quick] [--only MODEL] [--devices 8] [--repeats 3] [--json FILE]

Emulated: one process a device, the real runtime (shared memory, words, uploads, host optimizer), and a calibrated wait
in the place of every computation, as long as the published cost tables say, scaled so that none is below 10 ms. A
micro-batch a device and another one. Peers are 1F1B and interleaved 1F1B with recomputation and the best balanced
split, simulated, which is a little better than what they would run. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim, print_claims, write_report
from benchmarks.pipeline_tables import Model, read_models
from pipeline.actions import COMPUTE
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PipelineError
from pipeline.named import named_schedule
from pipeline.roundpipe.compute import WaitCompute
from pipeline.roundpipe.emulate import BOUNDARY_BYTES, emulated_layers, waits
from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import exchange_pids, open_store
from pipeline.roundpipe.lowering import completed
from pipeline.roundpipe.optimizer import HostOptimizer
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.planner import RoundPipePlan, plan
from pipeline.roundpipe.slots import LayerCosts
from pipeline.roundpipe.worker import SlotWorker
from pipeline.schedule import Schedule
from pipeline.simulate import duration, simulate
from pipeline.tracing import Trace

SHORTEST_S = 0.010
STEPS = 4
"""Of an asynchronous run."""
WITHIN = 0.03
RANK_TIMEOUT_S = 120.0


def scaled(model: Model, found: RoundPipePlan) -> Costs:
    """Return the table's costs, in seconds that make the shortest action of a plan `SHORTEST_S` long."""
    costs = Costs(forward_s=(model.costs.forward_s,), backward_s=(model.costs.backward_s,))
    schedule = found.schedule()
    shortest = min(duration(schedule, a, costs) for row in schedule.devices for a in row if a.op in COMPUTE)
    factor = SHORTEST_S / shortest
    rows = [tuple(factor * t for t in row) for row in (model.costs.forward_s, model.costs.backward_s)]
    return Costs(forward_s=(rows[0],), backward_s=(rows[1],))


def peer_s(costs: Costs, *, devices: int, microbatches: int) -> tuple[float, str]:
    """Return the simulated makespan of the better peer, and which it is."""
    found = []
    counts = [("1f1b", devices)] + [
        ("interleaved", devices * v) for v in range(2, min(6, costs.num_layers // devices) + 1)
    ]
    for name, stages in counts:
        try:
            schedule = named_schedule(
                name, devices=devices, microbatches=microbatches, costs=costs, stages=stages, recompute=True
            )
        except PipelineError:
            continue
        found.append((simulate(complete(schedule), costs).makespan_s, f"{name}, {stages} stages"))
    return min(found)


def rank_runs(rank: int, folder: str, schedule: Schedule, found: RoundPipePlan, costs: Costs, repeats: int) -> list:
    """Return when this device's first action began and its last ended, of each repeat."""
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
        trace.events.clear()
        worker.run(schedule)
        own = [event for event in trace.events if event.lane == "compute"]
        times.append((min(e.t0_ns for e in own), max(e.t1_ns for e in own)))
    worker.close()
    dist.destroy_process_group()
    return times[1:]


def _serve(connection: Connection, *arguments: Any) -> None:
    try:
        connection.send(rank_runs(*arguments))
    except BaseException:  # noqa: BLE001  (told to the parent, which raises)
        connection.send(traceback.format_exc())


def run_devices(schedule: Schedule, found: RoundPipePlan, costs: Costs, repeats: int) -> list[float]:
    """Return the makespan of every repeat, in seconds."""
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
        answers: list[Any] = [
            ours.recv() if ours.poll(2 * RANK_TIMEOUT_S) else "a rank did not answer" for ours, _ in ends
        ]
        for _, process in ends:
            process.join(10)
            process.kill()
    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        raise RuntimeError(failed[0])
    return [(max(a[k][1] for a in answers) - min(a[k][0] for a in answers)) / 1e9 for k in range(repeats)]


def measure(model: Model, devices: int, *, repeats: int, effort: float, asynchronous: bool) -> dict[str, Any]:
    """Return one row."""
    microbatches = 2 * devices
    layer_costs = LayerCosts(forward_s=model.costs.forward_s, backward_s=model.costs.backward_s)
    found = plan(layer_costs, num_devices=devices, num_microbatches=microbatches, effort=effort)
    costs = scaled(model, found)
    steps = STEPS if asynchronous else 1
    schedule = completed(found.schedule(steps=steps, staleness=int(asynchronous)))
    predicted_s = simulate(schedule, costs).makespan_s
    times = run_devices(schedule, found, costs, repeats)
    peer, which = peer_s(costs, devices=devices, microbatches=microbatches)
    again = sum(costs.forward_s[0][: sum(found.partition.backward)])
    floor_s = (sum(costs.forward_s[0]) + sum(costs.backward_s[0]) + again) * microbatches / devices
    measured_s = statistics.median(times)
    return {
        "model": model.name,
        "devices": devices,
        "mode": "asynchronous" if asynchronous else "synchronous",
        "step_s": measured_s / steps,
        "predicted_step_s": predicted_s / steps,
        "excess": measured_s / predicted_s - 1,
        "excess_of_each": [t / predicted_s - 1 for t in times],
        "peer_step_s": peer,
        "peer": which,
        "speedup": peer * steps / measured_s,
        "bound": peer / floor_s,
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
            claims.append(
                Claim(
                    name=f"emulated run against simulation, {n} devices", value=max(here), unit="share", bound=0.0,
                    target=f"<= {WITHIN}", met=max(here) <= WITHIN, note="worst model, median of repeats (emulated)",
                )
            )  # fmt: skip
    for mode, mean_target in (("synchronous", 1.12), ("asynchronous", 1.22)):
        eight = [row for row in rows if row["devices"] == 8 and row["mode"] == mode]
        if not eight:
            continue
        speedups, bound = [row["speedup"] for row in eight], statistics.mean(row["bound"] for row in eight)
        best = max(speedups)
        wanted = [("on average", statistics.mean(speedups), mean_target)]
        wanted += [("at best", best, 1.20)] if mode == "synchronous" else []
        for what, value, target in wanted:
            claims.append(
                Claim(
                    name=f"{mode} against the better peer, 8 devices, {what}", value=value, unit="x", bound=bound,
                    target=f">= {target}", met=value >= target, note=f"{len(eight)} models; the peer is simulated",
                )
            )  # fmt: skip
    return claims


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Emulated devices: the real runtime, waits for computation; the bound is the zero-bubble step")
    for column in ("model", "devices", "mode"):
        table.add_column(column)
    for column in ("step s", "simulated", "excess", "peer", "peer step s", "speed-up", "bound", "slots", "open"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["model"], str(row["devices"]), row["mode"], f"{row['step_s']:.3f}", f"{row['predicted_step_s']:.3f}",
            f"{row['excess']:+.1%}", row["peer"], f"{row['peer_step_s']:.3f}", f"{row['speedup']:.3f}",
            f"{row['bound']:.3f}", str(row["slots"]), str(row["open_slots"]),
        )  # fmt: skip
    Console(width=170).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest model, 2 devices, a small search")
    parser.add_argument("--only", help="one model")
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 4, 8], help="numbers of devices")
    parser.add_argument("--modes", nargs="*", default=["synchronous", "asynchronous"], help="asynchronous: 8 only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write rows and claims here")
    options = parser.parse_args(arguments)
    models = [m for m in read_models() if options.only in (None, m.name)]
    if options.quick:
        models, options.devices, options.modes = models[:1], [2], ["synchronous"]
    rows = []
    for model in models:
        for devices in options.devices:
            for mode in options.modes:
                if mode == "synchronous" or devices == 8:
                    effort = 0.02 if options.quick else 0.1
                    rows.append(
                        measure(
                            model, devices, repeats=options.repeats, effort=effort, asynchronous=mode == "asynchronous"
                        )
                    )
                    show(rows[-1:])
    show(rows)
    claims = claims_of(rows)
    print_claims(claims)
    if options.json:
        write_report(options.json, rows=rows, claims=claims)


if __name__ == "__main__":
    main()
