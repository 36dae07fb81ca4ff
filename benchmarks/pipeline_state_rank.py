"""One rank of the measured `state-aware`: chunk groups and whole sequences through the same two stages, in turn.

python -m benchmarks.pipeline_state_rank RANK FOLDER OPTIONS        (started by benchmarks.pipeline_state_aware)

T tokens of a micro-batch, D model width
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.pipeline_model import HOP_S, Shape, build
from chunkflow import ChunkLoader, MemorySource
from chunkflow.attention.base import ChunkView, Span
from chunkflow.attention.interface import attention_of
from chunkflow.collate import collate
from chunkflow.records import Chunk, Segment
from chunkflow.sources import shifted
from launch.layer_costs import measure_layer
from launch.pipeline_parts import RankParts, cut
from launch.pipeline_plan import units_of
from launch.split import DecoderArguments, call_decoder, split
from pipeline.comms import complete
from pipeline.config import PipelineConfig
from pipeline.costs import Costs
from pipeline.runtime import PipelineRuntime
from pipeline.schedule import Schedule
from pipeline.schedules.orders import plan_state_aware, plan_whole_sequences
from pipeline.transport import GroupTransport
from pipeline.unit_costs import UnitModel
from pipeline.units import Unit
from pipeline.validate import validate

RANKS = 2
SHAPE = Shape(name="small", layers=4, head=0.25, tokens=256, microbatches=1)
TIMEOUT_S = 600.0
PROBES = (32, 512, 4096)
"""Lengths that costs are fitted to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel(UnitModel):
    """What a token costs here, and beginning a micro-batch."""

    start_s: float = 0.0

    def costs(self, units: Sequence[Unit]) -> Costs:
        """Return one row a unit."""
        base, extra = UnitModel.costs(self, units), self.start_s
        forward = tuple(tuple(t + extra for t in row) for row in base.forward_s)
        backward = tuple(tuple(t + self.backward_ratio * extra for t in row) for row in base.backward_s)
        return replace(base, forward_s=forward, backward_s=backward, hop_s=HOP_S)


def fitted(model: Any, layers_per_stage: float) -> MeasuredModel:
    """Return costs of a stage, from one decoder layer at three lengths, both ranks at work. Every rank calls."""
    arguments = DecoderArguments(model)
    layer = next(piece for piece in split(model) if piece.kind == "decoder")
    rows, ratios = [], []
    for tokens in PROBES:
        hidden = torch.randn(1, tokens, model.config.hidden_size)
        view = ChunkView((Span(0, tokens, 0, 0),), None, 0)
        with attention_of(arguments.skeleton):
            keywords = arguments.of(hidden, torch.arange(tokens)[None], chunk_view=view)[0]

            def run(x: torch.Tensor, keywords: Any = keywords) -> torch.Tensor:
                return call_decoder(layer.module, x, keywords)

            dist.barrier()
            cost = measure_layer(run, hidden, layer.module, repeats=3)
        rows.append(cost.forward_s)
        ratios.append(cost.backward_s / cost.forward_s)
    found = torch.tensor([*rows, ratios[1]], dtype=torch.float64)
    dist.all_reduce(found)
    *seconds, ratio = (found / RANKS).tolist()
    powers = np.array([[1, n, n * n / 2] for n in PROBES], dtype=float)
    start_s, token_s, pair_s = np.linalg.solve(powers, np.array(seconds))
    return MeasuredModel(
        layers=RANKS,
        token_s=token_s * layers_per_stage,
        attention_tokens=token_s / max(pair_s, 1e-15),
        backward_ratio=ratio,
        state_bytes=0.1,
        start_s=max(0.0, start_s) * layers_per_stage,
    )


def in_order(chunks: Sequence[Chunk], units: Sequence[Unit]) -> tuple[Chunk, ...]:
    """Return the chunks in the order of a plan's units."""
    left: dict[tuple[int, int | None, int], list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        left[chunk.num_tokens, chunk.group, chunk.index].append(chunk)
    return tuple(left[unit.tokens, unit.group, unit.index].pop(0) for unit in units)


@dataclass(frozen=True, slots=True)
class Way:
    """A schedule, complete, and its micro-batches."""

    schedule: Schedule
    chunks: tuple[Chunk, ...]
    simulated_s: float


def ways_of(lengths: Sequence[int], chunk_tokens: int, retains: Sequence[int], model: UnitModel) -> dict[str, Way]:
    """Return ours, within the memory of the other, and 1F1B on whole sequences with recomputation; best orders."""
    random = np.random.default_rng(0)
    source = MemorySource([shifted(random.integers(0, 256, n), None) for n in lengths])
    whole = plan_whole_sequences(lengths, model, devices=RANKS, recompute=True)
    with ChunkLoader(
        source, chunk_tokens=chunk_tokens, global_batch=len(lengths), rank=0, world_size=1, report=lambda _: None
    ) as loader:
        chunks = next(iter(loader)).chunks
    cap = max(whole.best.result.peak_bytes)
    ours = plan_state_aware(units_of(chunks, 1), model, devices=RANKS, retains=retains, memory_cap_bytes=cap)
    single = collate([Chunk((Segment(i, 0, n, 0),)) for i, n in enumerate(lengths)], source)
    found = {}
    for name, plan, given in (("ours", ours.best, chunks), ("whole", whole.best, single)):
        assert plan.schedule.units is not None
        schedule = complete(plan.schedule)
        validate(schedule)
        found[name] = Way(schedule, in_order(given, plan.schedule.units), plan.result.makespan_s)
    return found


def train(parts: RankParts, runtime: PipelineRuntime, way: Way, step: int) -> tuple[float, float, float]:
    """Run forward and backward once; return seconds of the slower rank, loss, and the squared norm of the gradient."""
    for p in parts.model.parameters():
        p.grad = None
    denominator = float(sum((c.tensors()["loss_weights"]).sum() for c in way.chunks))
    for layers in parts.layers.values():
        layers.begin(way.chunks, denominator=denominator, dropout_seed=0)
    dist.barrier()
    began = time.perf_counter()
    losses = runtime.run(way.schedule, step=step)
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    norm = sum(float(p.grad.double().square().sum()) for p in parts.model.parameters() if p.grad is not None)
    sums = torch.tensor([sum(float(loss) for loss in losses.values()), norm], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(seconds), *sums.tolist()


def main() -> None:
    """Join the world of two, measure, let rank 0 write the row."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder.resolve() / 'store'}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=900),
    )  # fmt: skip
    model = build(SHAPE)
    lengths: list[int] = options["lengths"]
    ways = ways_of(lengths, options["chunk_tokens"], options["retains"], fitted(model, SHAPE.layers / RANKS))
    parts = cut(model, PipelineConfig(ranks=RANKS), rank=rank)
    group = dist.group.WORLD
    assert group is not None
    runtime = PipelineRuntime(parts.stages, GroupTransport(group), rank=rank, timeout_s=TIMEOUT_S)
    first = {name: train(parts, runtime, way, 0) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options["rounds"]):
        for name in list(ways) if number % 2 else reversed(ways):
            seconds[name].append(train(parts, runtime, ways[name], 1 + number)[0])
    runtime.close()
    if rank == 0:
        (_, ours, norm), (_, theirs, other) = first["ours"], first["whole"]
        row = {
            "seconds": seconds,
            "simulated": ways["ours"].simulated_s / ways["whole"].simulated_s,
            "simulated_s": {name: way.simulated_s for name, way in ways.items()},
            "losses_apart": abs(ours - theirs) / abs(theirs),
            "norms_apart": abs(norm - other) / other,
            "tokens": sum(lengths),
            "longest": max(lengths),
        }
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
