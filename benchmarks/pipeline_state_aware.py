"""The part `state-aware` of `benchmarks.pipeline`: chunk groups through a pipeline, against whole sequences.

Simulated at 4 and 8 stages: global batches of the `lmsys` lengths, and one with a sequence of 300K tokens among them.
Ours chooses order, retain and lead within the memory that 1F1B needs on whole sequences with recomputation in its best
order. Costs are linear in tokens, with attention as much as the rest of a layer at a context of 24K. `measured`: two
ranks, a small Llama, the lengths divided by 32, on our runtime: torch's fixes its buffers by the first micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim
from benchmarks.moe_claims import at_most
from benchmarks.pipeline_options import Options
from benchmarks.ranks import run_ranks
from chunkflow.config import PlannerConfig
from chunkflow.lengths import lmsys
from chunkflow.plan import plan_step
from launch.pipeline_plan import units_of
from pipeline.actions import Op
from pipeline.errors import PlanError
from pipeline.schedules.build import with_recompute
from pipeline.schedules.orders import Candidate, OrderPlan, plan_state_aware, plan_whole_sequences
from pipeline.simulate import simulate
from pipeline.unit_costs import UnitModel
from pipeline.units import Unit

Row = dict[str, Any]

PART = "state-aware"
NUM, LONGEST, SEEDS = 512, 300_000, (0, 3, 2)
WITH_LONG = "lmsys with 300K"
CHUNK_TOKENS = (512, 2048)
"""Tried; the better one that fits."""
RETAINS = (1, 2)
TARGETS = {4: 0.70, 8: 0.63}
CHOICES = ("chunk_tokens", "order", "retain", "ahead")
FACTOR, MEASURED_NUM, MEASURED_CHUNK = 32, 128, 256


def batches(num: int) -> dict[str, np.ndarray]:
    """Return global batches by name: three as they are drawn, and one with a sequence as long as they get."""
    drawn = {seed: lmsys(num, seed=seed) for seed in SEEDS}
    named = {f"lmsys, longest {round(lengths.max() / 1000)}K": lengths for lengths in drawn.values()}
    with_long = drawn[SEEDS[0]].copy()
    with_long[num // 3] = LONGEST
    return {**named, WITH_LONG: with_long}


def units_for(lengths: np.ndarray, chunk_tokens: int) -> list[Unit]:
    """Return the chunks that our loader makes of a global batch."""
    config = PlannerConfig(chunk_tokens=chunk_tokens)
    samples = np.arange(len(lengths))
    chunks = plan_step(0, samples, lengths, config=config, world_size=1, denominator=1.0).ranks[0]
    return list(units_of(chunks, 1))


def best_chunks(lengths: np.ndarray, model: UnitModel, cap: float) -> tuple[int, OrderPlan]:
    """Return the better size of chunks that fits, and its plan."""
    found = []
    for chunk_tokens in CHUNK_TOKENS:
        try:
            units = units_for(lengths, chunk_tokens)
            plan = plan_state_aware(units, model, devices=model.layers, retains=RETAINS, memory_cap_bytes=cap)
            found.append((plan.best.result.makespan_s, chunk_tokens, plan))
        except PlanError:  # nothing of that size fits
            continue
    if not found:
        raise PlanError(f"no chunks of {CHUNK_TOKENS} tokens fit {cap:.0f} bytes a device")
    return min(found, key=lambda entry: entry[0])[1:]


def simulated(name: str, lengths: np.ndarray, stages: int) -> Row:
    """Return one row."""
    model = UnitModel(layers=stages, attention_tokens=24_576, state_bytes=0.1, boundary_bytes=0.06)
    sequences = lengths.tolist()
    whole = plan_whole_sequences(sequences, model, devices=stages, recompute=True)
    cap = max(whole.best.result.peak_bytes)
    plain = plan_whole_sequences(sequences, model, devices=stages, recompute=False)
    chunk_tokens, ours = best_chunks(lengths, model, cap)
    best_s, peer_s = ours.best.result.makespan_s, whole.best.result.makespan_s
    given = [c for c in ours.tried if c.order == "as given" and c.fits]
    costs = model.costs(units_for(lengths, chunk_tokens))
    total_s = stages * sum(row[0] for rows in (costs.forward_s, costs.backward_s) for row in rows)
    return {
        "part": PART,
        "model": name,
        "devices": stages,
        "mode": "simulated",
        "ratio": best_s / peer_s,
        "random_order": min(c.result.makespan_s for c in given) / _in_order(whole).result.makespan_s,
        "over_no_recompute": best_s / plain.best.result.makespan_s,
        "over_last_stage_kept": best_s / _last_kept(whole.best, model),
        "useful": ours.best.result.useful,
        "bound": total_s / stages / peer_s,
        "longest": int(lengths.max()),
        "chosen": {"chunk_tokens": chunk_tokens, **ours.best.to_json()},
        "peer_order": whole.best.order,
        "peak_over_cap": max(ours.best.result.peak_bytes) / cap,
        "plain_peak_over_cap": max(plain.best.result.peak_bytes) / cap,
    }


def _in_order(plan: OrderPlan) -> Candidate:
    return next(c for c in plan.tried if c.order == "as given")


def _last_kept(best: Candidate, model: UnitModel) -> float:
    """Return the makespan of the peer when its last stage keeps what it would make again at once."""
    schedule, units = best.schedule, best.schedule.units
    assert units is not None
    rows = [[a for a in row if a.op is not Op.R] for row in schedule.devices]
    schedule = with_recompute(schedule.with_devices(rows), keep_last_stage=True)
    return simulate(schedule, model.costs(units)).makespan_s


def measured(options: Options) -> list[Row]:
    """Run two ranks; return their row."""
    num = 24 if options.quick else MEASURED_NUM
    lengths = np.maximum(2, batches(num)[WITH_LONG] // (FACTOR * (8 if options.quick else 1)))
    rounds = options.rounds or (1 if options.quick else 3)
    chosen = {"lengths": lengths.tolist(), "chunk_tokens": MEASURED_CHUNK, "rounds": rounds, "retains": RETAINS}
    rows = run_ranks("benchmarks.pipeline_state_rank", chosen, ranks=2, deadline_s=1800)
    head = {"part": PART, "model": f"{WITH_LONG}, over {FACTOR}", "devices": 2, "mode": "measured"}
    return [{**head, **row} for row in rows]


def run(options: Options) -> Iterator[Row]:
    """Simulate, then measure."""
    for name, lengths in batches(128 if options.quick else NUM).items():
        for stages in TARGETS:
            if name in options.models or not (options.models or (options.quick and name != WITH_LONG)):
                yield simulated(name, lengths, stages)
    if not options.models or "measured" in options.models:
        yield from measured(options)


def show(rows: Sequence[Row]) -> None:
    """Print both tables."""
    table = Table(title="state-aware 1F1B, simulated: makespan over that of 1F1B on whole sequences with recomputation")
    for column in ("batch", "stages", "best orders", "random order", "bound", "peer keeps its\nlast stage",
                   "over 1F1B\nwithout recompute", "that needs, of\nthe cap", "ours, of\nthe cap", "useful",
                   "chunk, order, retain, lead"):  # fmt: skip
        table.add_column(column, justify="left" if column == "batch" else "right")
    for row in (r for r in rows if r["mode"] == "simulated"):
        keys = ("ratio", "random_order", "bound", "over_last_stage_kept", "over_no_recompute", "plain_peak_over_cap")
        chosen = row["chosen"]
        table.add_row(
            row["model"], str(row["devices"]), *(f"{row[key]:.3f}" for key in keys), f"{row['peak_over_cap']:.3f}",
            f"{row['useful']:.3f}", ", ".join(str(chosen[key]) for key in CHOICES),
        )  # fmt: skip
    Console(width=170).print(table)
    for row in (r for r in rows if r["mode"] == "measured"):
        ours, peer = row["seconds"]["ours"], row["seconds"]["whole"]
        print(
            f"measured, {row['model']}: {row['tokens']} tokens, the longest {row['longest']}, two ranks: "
            f"{median(ours):.2f} s ({min(ours):.2f} to {max(ours):.2f}) against {median(peer):.2f} s "
            f"({min(peer):.2f} to {max(peer):.2f}); ratio {ratio_of(row):.3f}, simulated {row['simulated']:.3f}"
        )


def ratio_of(row: Row) -> float:
    """Return the median of the measured ratios, round by round."""
    pairs = zip(row["seconds"]["ours"], row["seconds"]["whole"], strict=True)
    return median(ours / whole for ours, whole in pairs)


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Return the targets at 4 and 8 stages; what two ranks measured has none of its own but the simulator."""
    claims = []
    for row in rows:
        if row["mode"] == "simulated":
            name = f"{row['model']}, {row['devices']} stages: makespan over 1F1B on whole sequences"
            note = (
                f"both in their best order, {row['peak_over_cap']:.2f} of its memory; random {row['random_order']:.2f}"
            )
            claims.append(
                at_most(name, row["ratio"], TARGETS[row["devices"]], "x", row["bound"], f"{note} (simulated)")
            )
        else:
            note = f"two real ranks, losses apart {row['losses_apart']:.1e}"
            limit = round(row["simulated"] * 1.05, 3)
            name = "state-aware on two ranks: makespan over 1F1B on whole sequences"
            claims.append(
                at_most(name, ratio_of(row), limit, "x", row["simulated"], f"{note}; the target is 1.05 of it")
            )
    return claims
