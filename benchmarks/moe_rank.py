"""One rank of `benchmarks.moe`, on its emulated host: profile the links, plan, run every way in turn, report.

python -m benchmarks.moe_rank RANK PORT FOLDER OPTIONS        (started by benchmarks.moe)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.moe_layers import ROW_BYTES, BenchLayer, grid, models
from benchmarks.moe_stack import Stack, World, make_world, waiting_experts
from moe.calibrate import measure_layer, with_overheads
from moe.cost import LayerLoad, Profile, gradient_time, lane_bound, serial_time, stage_times
from moe.issue import Span
from moe.metrics import covered
from moe.netns import TwoHosts, reshape
from moe.plan import COMPUTE, GRADIENT, INTRA, LayerPlan
from moe.planner import best_fixed, fixed_time, plan_layer
from moe.profiler import Links, ProfileConfig, agree_on_plans, make_profile
from moe.simulate import predict
from moe.spread import plan_model

MIDDLE = (200.0, 1000.0)
"""Mbit/s between and within hosts, for a share of 0.5. Twice as fast, the cores bound the links, not the shaping."""
FIXED = (1, 2, 3, 4, 6, 8, 12)
"""What the best single r is chosen from."""


class Bench:
    """What all measurements of a rank share."""

    def __init__(self, rank: int, folder: Path, options: dict[str, Any]) -> None:
        self.rank, self.folder, self.options = rank, folder, options
        self.quick: bool = options["quick"]
        self.shares: list[float] = options["shares"]
        self.chosen = slice(*options["rows"])
        """Of the layers, or stacks, of a part."""
        self.world: World = make_world()
        self.rows: list[dict[str, Any]] = []

    def set_speed(self, share: float) -> None:
        """Change the links of both hosts, for communication to have this share where at 0.5 it equals computation."""
        faster = (1 - share) / share
        dist.barrier()
        if self.rank == 0:
            net = TwoHosts(name=self.options["net"])
            reshape(net, inter_mbit=MIDDLE[0] * faster, intra_mbit=MIDDLE[1] * faster)
        dist.barrier()

    def profile_at(self, share: float, layers: Sequence[BenchLayer]) -> Profile:
        """Change the links' speed, and measure links and waits. Rows are microseconds of waiting in forward."""
        self.set_speed(share)
        world = self.world
        links = Links(
            inter=world.inter,
            ep=world.ep,
            intra=world.intra,
            esp=world.lanes.esp,
            gradients=world.gradients,
        )
        config = ProfileConfig(
            least_bytes=64 << 10,
            most_bytes=2 * max(layer.exchange_bytes for layer in layers),
            least_rows=1000,
            most_rows=30_000,  # waits are as long as asked, whatever the length
            sizes=5,
            tries=5,
        )
        profile = make_profile(
            links,
            expert_forward=lambda us: lambda: time.sleep(us * 1e-6),
            expert_backward=lambda us: lambda: time.sleep(us * 2e-6),
            config=config,
            progress=lambda _: self.world.spans.clear(),
        )
        return self.calibrated(profile, layers[len(layers) // 2])

    def calibrated(self, profile: Profile, layer: BenchLayer) -> Profile:
        """Add what the executor costs, from runs of one layer whose experts take as long as its communication."""
        expert_s = communication_s(profile, layer) / 3
        experts, rows = waiting_experts(layer, expert_s), torch.zeros(1)
        took = measure_layer(experts, self.world.lanes, rows=layer.rows, width=ROW_BYTES // 4, like=rows)
        return with_overheads(profile, load_of(layer, expert_s), *took)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def load_of(layer: BenchLayer, expert_s: float, *, gradients: bool = True) -> LayerLoad:
    """Return what the planner is told of a layer."""
    return LayerLoad(
        exchange_bytes=layer.exchange_bytes,
        gather_bytes=layer.gather_bytes,
        expert_rows=expert_s * 1e6,
        gradient_bytes=layer.gradient_bytes if gradients else 0,
        slice_bytes=layer.slice_bytes,
    )


def communication_s(profile: Profile, layer: BenchLayer) -> float:
    """Return the seconds of communication of the serial layer, forward, backward and gradients."""
    t = stage_times(profile, load_of(layer, 0), 1, backward=True)
    return 4 * t.all_to_all + 2 * (t.gather + t.scatter) + t.gradient


def run_grid(bench: Bench) -> None:
    """Measure every layer at every link speed: ours, the best single r, no overlap."""
    layers = grid(quick=bench.quick)[bench.chosen]
    middle = bench.profile_at(0.5, layers)
    expert_s = [communication_s(middle, layer) / 3 for layer in layers]
    for share in bench.shares:
        profile = bench.profile_at(share, layers)
        bench.say(f"share {share}: {profile.to_json()}")
        for layer, e in zip(layers, expert_s, strict=True):
            bench.rows.append(grid_row(bench, profile, layer, e, share))
            bench.say(json.dumps(bench.rows[-1]))


def grid_row(bench: Bench, profile: Profile, layer: BenchLayer, expert_s: float, share: float) -> dict[str, Any]:
    load = load_of(layer, expert_s)
    plan = agree_on_plans({"layer": plan_layer(profile, load)})["layer"]
    stack = Stack(bench.world, [layer], [expert_s], [layer.gradient_bytes, 0])
    fixed_r = search_fixed(stack, best_fixed(profile, load)[0])
    ways = {"ours": plan, "fixed": LayerPlan(fixed_r, fixed_r), "none": LayerPlan(1, 1)}
    measured, hidden = interleave(stack, {name: [p] for name, p in ways.items()}, rounds=3 if bench.quick else 7)
    serial_s = sum(serial_time(profile, load, backward=b) for b in (False, True))
    planned, sent = planned_hidden(profile, load, plan)
    after = 0.0 if plan.gradient_bytes else gradient_time(profile, load)
    return {
        "part": "grid", "layer": layer.name, "share_target": share,
        "share": communication_s(profile, layer) / serial_s,
        "forward_chunks": plan.forward_chunks, "backward_chunks": plan.backward_chunks, "order": plan.order,
        "fixed_r": fixed_r, "gradient_ratio": layer.gradient_bytes / layer.exchange_bytes,
        **{f"{name}_s": seconds for name, seconds in measured.items()},
        "predicted_s": plan.predicted_s, "predicted_fixed_s": sum(fixed_time(profile, load, fixed_r)),
        "predicted_none_s": serial_s,
        "bound_s": sum(lane_bound(profile, load, backward=b) for b in (False, True)),
        "hidden_planned": planned / (sent + after), "hidden": hidden,
    }  # fmt: skip


def search_fixed(stack: Stack, predicted: int) -> int:
    """Return the single r that is fastest when measured, in runs of their own: each once, the best three again."""

    def run(r: int) -> float:
        return stack.step([LayerPlan(r, r)] * len(stack.layers))

    first = {r: run(r) for r in sorted({*FIXED, predicted})}
    again = {r: min(first[r], run(r)) for r in sorted(first, key=lambda r: first[r])[:3]}
    return min(again, key=lambda r: again[r])


def interleave(stack: Stack, ways: dict[str, list[LayerPlan]], *, rounds: int) -> tuple[dict[str, float], float]:
    """Run every way once a round, in turning order; return medians, and the median of what `ours` hid."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    hidden: list[float] = []
    names = list(ways)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(stack.step(ways[name]))
            if name == "ours":
                hidden.append(measured_hidden(stack.world.spans))
    mine = torch.tensor([median(hidden)], dtype=torch.float64)
    dist.all_reduce(mine, dist.ReduceOp.MIN)
    return {name: median(values) for name, values in times.items()}, mine.item()


def measured_hidden(spans: Sequence[Span]) -> float:
    """Return what part of all gradient slices ran beside experts or the intra-node link."""
    slices = [(s.t0_ns, s.t1_ns) for s in spans if s.op == GRADIENT]
    others = [(s.t0_ns, s.t1_ns) for s in spans if s.link in (COMPUTE, INTRA)]
    return covered(slices, others) / max(covered(slices, slices), 1.0)


def planned_hidden(profile: Profile, load: LayerLoad, plan: LayerPlan) -> tuple[float, float]:
    """Return the seconds of this layer's slices beside experts or the intra-node link as predicted, and all of them."""
    if not plan.gradient_bytes:
        return 0.0, 0.0
    r = plan.backward_chunks
    sent = replace(load, gradient_bytes=plan.gradient_bytes)
    t = stage_times(profile, sent, r, backward=True, pieces=plan.pieces)
    events = predict(profile, t, r, order=plan.order, lag=plan.backward_lag)
    slices = [(e.t0_s, e.t1_s) for e in events if e.op.name == GRADIENT]
    others = [(e.t0_s, e.t1_s) for e in events if e.lane in (COMPUTE, INTRA)]
    return covered(slices, others), covered(slices, slices)


def run_models(bench: Bench) -> None:
    """Measure the three model-shaped stacks: a layer hides the gradients of the layer above; the top one has none."""
    stacks = models(quick=bench.quick)[bench.chosen]
    every = [layer for layers in stacks for layer in layers]
    middle = bench.profile_at(0.5, every)
    for share in bench.shares:
        profile = bench.profile_at(share, every)
        for layers in stacks:
            expert_s = communication_s(middle, layers[0]) / 3
            bench.rows.append(model_row(bench, profile, layers, expert_s, share))
            bench.say(json.dumps(bench.rows[-1]))


def model_row(
    bench: Bench, profile: Profile, layers: list[BenchLayer], expert_s: float, share: float
) -> dict[str, Any]:
    count = len(layers)
    gradient = layers[0].gradient_bytes
    ready = [0, *[gradient] * count]
    loads = [load_of(layer, expert_s, gradients=False) for layer in layers]
    plans = plan_model(profile, loads, ready, quantum=layers[0].slice_bytes)
    plans = list(agree_on_plans({str(i): p for i, p in enumerate(plans)}).values())
    stack = Stack(bench.world, layers, [expert_s] * count, ready)
    fixed_r = search_fixed(stack, best_fixed(profile, loads[0])[0])
    ways = {"ours": plans, "fixed": [LayerPlan(fixed_r, fixed_r)] * count, "none": [LayerPlan(1, 1)] * count}
    measured, hidden = interleave(stack, ways, rounds=3 if bench.quick else 5)
    flush = gradient_time(profile, replace(loads[0], gradient_bytes=sum(ready) - sum(p.gradient_bytes for p in plans)))
    after = gradient_time(profile, replace(loads[0], gradient_bytes=sum(ready)))
    slices = [planned_hidden(profile, load, p) for load, p in zip(loads, plans, strict=True)]
    serial_s = after + sum(serial_time(profile, load, backward=b) for load in loads for b in (False, True))
    bound = sum(lane_bound(profile, load, backward=b) for load in loads for b in (False, True))
    return {
        "part": "models", "layer": layers[0].name, "layers": count, "share_target": share,
        "share": 1 - 3 * expert_s * count / serial_s,
        "forward_chunks": [p.forward_chunks for p in plans], "backward_chunks": [p.backward_chunks for p in plans],
        "gradient_bytes": [p.gradient_bytes for p in plans], "order": plans[0].order, "fixed_r": fixed_r,
        **{f"{name}_s": seconds for name, seconds in measured.items()},
        "predicted_s": flush + sum(p.predicted_s for p in plans),
        "predicted_fixed_s": after + sum(sum(fixed_time(profile, load, fixed_r)) for load in loads),
        "predicted_none_s": serial_s,
        "bound_s": max(bound, 3 * expert_s * count),
        "hidden_planned": sum(part for part, _ in slices) / (flush + sum(whole for _, whole in slices)),
        "hidden": hidden,
    }  # fmt: skip


PARTS = {"grid": run_grid, "models": run_models}


def main() -> None:
    """Join the world, run the parts, and let rank 0 write the rows."""
    rank, port, folder, options = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    address = TwoHosts(name=options["net"]).addresses[0]
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=4, timeout=timedelta(seconds=120)
    )
    bench = Bench(rank, folder, options)
    for part in options["parts"]:
        PARTS[part](bench)
        if rank == 0:
            (folder / "rows.json").write_text(json.dumps(bench.rows))
    bench.world.lanes.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
