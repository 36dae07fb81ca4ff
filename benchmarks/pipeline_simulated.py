"""The part `simulated` of `benchmarks.pipeline`: RoundPipe's planner on the published cost tables, 8 devices.

Measured layer times of one RTX 4090; no model runs here. First the published column is made again from its own
partitions and rules (two rounds of eight, strict order; in it the head may start its forward before its input is
there, which two rows need to come out). Then ours: all data dependencies kept, partition, fused layers, rounds and open
slots searched. The bubble counts recomputation as work, as published; `useful` does not. Beside each stands the
makespan over the bound of no idle device for the same recomputed layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim
from benchmarks.moe_claims import at_most
from benchmarks.pipeline_options import Options
from benchmarks.pipeline_tables import NUM_DEVICES, NUM_MICROBATCHES, PUBLISHED_ROUNDS, Model, read_models
from pipeline.roundpipe.planner import RoundPipePlan, evaluate, plan, zero_bubble_s
from pipeline.roundpipe.search import Problem

PART = "simulated"
TARGETS = {"Qwen3-1.7B": 0.104, "Llama3-8B": 0.075, "GPT-OSS-20B": 0.125, "Qwen3-32B": 0.042, "Qwen3-235B": 0.027}
PLAN_SECONDS = 10.0
REPRODUCED = 0.001
"""How far a reproduced bubble may be from the printed one: the last digit."""


def published_rules(model: Model) -> float:
    """Return the bubble by the published rules: the head's forward waits for nothing, like a recomputation."""
    layers, partition = model.costs, model.published
    num_forward, m = len(partition.forward), PUBLISHED_ROUNDS[0]
    free, busy, end = np.zeros(NUM_DEVICES), 0.0, 0.0
    ranges = [layers_of_slot for _, layers_of_slot in partition.ranges()]
    slots = list(enumerate(ranges)) * len(PUBLISHED_ROUNDS)
    arrival = np.zeros(m)
    for cursor, (slot, (low, high)) in enumerate(slots):
        arrival = np.zeros(m) if slot == 0 else arrival
        device = cursor % NUM_DEVICES
        forward_s, backward_s = sum(layers.forward_s[low:high]), sum(layers.backward_s[low:high])
        for i in range(m):
            if slot < num_forward:
                t = max(free[device], arrival[i]) + forward_s
            else:
                t = max(free[device] + forward_s, arrival[i]) + backward_s
            free[device] = t
            arrival[i] = t + layers.transfer_s
            busy += forward_s + (backward_s if slot >= num_forward else 0.0)
            end = max(end, t)
    return 1 - busy / (NUM_DEVICES * end)


def describe(found: RoundPipePlan, model: Model) -> dict[str, Any]:
    """Return the numbers of one plan."""
    recomputed = sum(found.partition.backward)
    floor_s = zero_bubble_s(
        model.costs, num_devices=NUM_DEVICES, num_microbatches=NUM_MICROBATCHES, recomputed_layers=recomputed
    )
    return {
        "bubble": found.bubble,
        "useful": found.useful,
        "makespan_ms": found.makespan_s,
        "zero_bubble_ms": floor_s,
        "rounds": list(found.rounds),
        "open_slots": found.open_slots,
        "slots": found.partition.num_slots,
        "fused": found.partition.fused,
        "forward": list(found.partition.forward),
        "backward": list(found.partition.backward),
    }


def measure(model: Model, effort: float) -> dict[str, Any]:
    """Return one row: published, reproduced, its partition with dependencies kept, and ours."""
    problem = Problem(costs=model.costs, rounds=PUBLISHED_ROUNDS, num_devices=NUM_DEVICES, open_slots=1)
    begin = time.perf_counter()
    ours = plan(model.costs, num_devices=NUM_DEVICES, num_microbatches=NUM_MICROBATCHES, effort=effort)
    seconds = time.perf_counter() - begin
    strict = plan(
        model.costs, num_devices=NUM_DEVICES, num_microbatches=NUM_MICROBATCHES, open_slots=(1,), effort=effort
    )
    return {
        "part": PART,
        "model": model.name,
        "published_bubble": model.published_bubble,
        "reproduced_bubble": published_rules(model),
        "published_partition": describe(evaluate(problem, model.published), model),
        "strict": describe(strict, model),
        "ours": describe(ours, model),
        "plan_seconds": seconds,
        "reasons": list(ours.reasons),
    }


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Return, for each model, the bubble, how well the published one came out, and what planning took."""
    claims = []
    for row in rows:
        name, ours = row["model"], row["ours"]
        over = ours["makespan_ms"] / ours["zero_bubble_ms"]
        note = f"published {row['published_bubble']:.3f}; {over:.3f} times the zero-bubble makespan of the same work"
        claims.append(
            at_most(f"simulated bubble, {name}", ours["bubble"], TARGETS[name], "share", 0.0, f"{note} (simulated)")
        )
        off = abs(row["reproduced_bubble"] - row["published_bubble"])
        note = f"{row['reproduced_bubble']:.4f} by its partition and rules"
        claims.append(at_most(f"published bubble reproduced, {name}", off, REPRODUCED, "share", 0.0, note))
        note = "one core, compilation included where this is the first row and nothing was cached"
        claims.append(at_most(f"planning time, {name}", row["plan_seconds"], PLAN_SECONDS, "s", None, note))
    return claims


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Simulated bubble of one synchronous step, 8 devices, 16 micro-batches, %")
    for column in ("model", "published", "reproduced", "its cut, dependencies kept", "ours, strict", "ours"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for column in ("useful share", "over zero bubble", "rounds", "open", "slots", "fused", "plan s"):
        table.add_column(column, justify="right")
    for row in rows:
        ours = row["ours"]
        bubbles = [row["published_bubble"], row["reproduced_bubble"]]
        bubbles += [row[k]["bubble"] for k in ("published_partition", "strict", "ours")]
        table.add_row(
            row["model"],
            *(f"{100 * b:.2f}" for b in bubbles),
            f"{ours['useful']:.3f}",
            f"{ours['makespan_ms'] / ours['zero_bubble_ms']:.3f}",
            "+".join(map(str, ours["rounds"])),
            str(ours["open_slots"]),
            str(ours["slots"]),
            str(ours["fused"]),
            f"{row['plan_seconds']:.1f}",
        )
    Console(width=160).print(table)


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Plan the models that are asked for, anew: the time it takes is part of the result."""
    for model in read_models():
        if not options.models or model.name in options.models:
            yield measure(model, 0.05 if options.quick else options.effort)
