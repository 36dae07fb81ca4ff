"""One rank of the parts `real` and `capped` of `benchmarks.pipeline`.

python -m benchmarks.pipeline_real_rank RANK FOLDER OPTIONS        (started by benchmarks.pipeline_real)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from benchmarks.pipeline_model import Shape, build, head_layers, measured_costs, one_step
from benchmarks.pipeline_peers import Peer, best_peers
from benchmarks.pipeline_ways import RoundPipe, TorchPipeline, Way, gradient_apart, turned
from launch.slot_layers import SlotLayers
from launch.split import DecoderArguments
from pipeline.actions import Op
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.roundpipe.planner import RoundPipePlan, plan, zero_bubble_s
from pipeline.roundpipe.slots import LayerCosts
from pipeline.simulate import simulate

RANKS = 2
EFFORT = 0.3
ROUNDS = (1, 2, 4, 8)
STAGES_PER_RANK = 3
UNDER = 0.95
"""The cap, of what 1F1B needs at its best split when it recomputes nothing: so everybody recomputes."""
TIMES_OVER = 8
"""In `capped`, how many times as large weights and gradients are as a device."""

T = TypeVar("T")


class Bench:
    """What a rank prepares: the model, its costs, and the schedules, the same on every rank."""

    def __init__(self, shape: Shape, *, quick: bool) -> None:
        self.shape, self._repeats = shape, 2 if quick else 5
        self._take(build(shape))
        if shape.head:  # its matrix product is faster than a layer of the same weight
            vocabulary = self.model.config.vocab_size * shape.head / head_layers(self.costs)
            self._take(build(shape, vocabulary=round(vocabulary)))
        # Of the embedding, RoundPipe brings rows only, and keeps them as it keeps activations.
        costs, ((kept, *others),) = self.costs, self.costs.activation_bytes
        rows_only = replace(
            costs,
            weight_bytes=(0.0, *costs.weight_bytes[1:]),
            activation_bytes=((kept + costs.boundary_bytes[0], *others),),
        )
        self.slot_costs = LayerCosts.of(rows_only)
        self.copy_bytes_per_s = _from_first(_copy_rate)

    def _take(self, model: PreTrainedModel) -> None:
        self.model = model
        self.width: int = model.config.hidden_size
        self.batch = one_step(self.shape, model.config.vocab_size)
        self.arguments, self.layers = DecoderArguments(model), SlotLayers(model, torch.device("cpu"))
        self.costs = measured_costs(self.layers, self.batch, self.width, repeats=self._repeats)

    def peers(self) -> list[Peer]:
        """Return 1F1B and the best interleaved 1F1B."""
        found = _from_first(
            lambda: best_peers(
                self.costs, devices=RANKS, microbatches=self.shape.microbatches, keep_last=True, most=STAGES_PER_RANK
            )
        )
        return [next(p for p in found if p.name == name) for name in ("1f1b", "interleaved")]

    def cap_bytes(self, peers: list[Peer]) -> int:
        """Return 95% of what 1F1B needs without recomputation, where that is less with it."""
        one = next(peer for peer in peers if peer.name == "1f1b")
        plain = one.schedule.with_devices([[a for a in row if a.op is not Op.R] for row in one.schedule.devices])
        return int(UNDER * max(simulate(plain, self.costs).peak_bytes))

    def plan(self, cap_bytes: int) -> RoundPipePlan:
        """Return RoundPipe's plan: the shortest step, with the copies that more rounds make on the same cores."""
        return RoundPipePlan.from_json(_from_first(lambda: self._search(cap_bytes).to_json()))

    def _search(self, cap_bytes: int) -> RoundPipePlan:
        found = []
        for rounds in (r for r in ROUNDS if r <= self.shape.microbatches):
            try:
                found.append(
                    plan(
                        self.slot_costs, num_devices=RANKS, num_microbatches=self.shape.microbatches,
                        num_rounds=[rounds], memory_cap_bytes=cap_bytes, effort=EFFORT,
                    )
                )  # fmt: skip
            except PlanError:  # no partition fits
                continue
        if not found:
            raise PlanError(f"no plan of RoundPipe fits {cap_bytes:,} bytes a device")
        return min(found, key=lambda p: p.makespan_s + self.copies_s(p))

    def copies_s(self, found: RoundPipePlan) -> float:
        """Return the seconds a core copies weights up and gradients down in one step, as every CPU device does."""
        weights, moved = self.slot_costs.weight_bytes, 0.0
        for op, (low, high) in found.partition.ranges():
            moved += sum(weights[low:high]) * (1 if op is Op.F else 3)  # gradients are read and added
        return moved * len(found.rounds) / RANKS / self.copy_bytes_per_s

    def ours(self, found: RoundPipePlan, cap_bytes: int) -> RoundPipe:
        """Return RoundPipe, which takes the model over."""
        return RoundPipe(self.layers, found, self.batch, room=int(self.costs.boundary_bytes[0]), cap_bytes=cap_bytes)

    def torch(self, peer: Peer) -> TorchPipeline:
        """Return a peer with copies of its layers."""
        return TorchPipeline(self.layers.pieces, self.arguments, self.batch, peer.bounds, width=self.width)


def _copy_rate() -> float:
    a, b = torch.ones(2**24), torch.empty(2**24)
    b.copy_(a)
    began = time.perf_counter()
    for _ in range(4):
        b.copy_(a)
    return 4 * a.nbytes / (time.perf_counter() - began)


def _from_first(make: Callable[[], T]) -> T:
    """Return what rank 0 makes. Every rank calls."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box = [make()]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _largest(value: float) -> float:
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def timed(step: Way) -> tuple[float, float]:
    """Return the seconds of the slower rank, and the loss."""
    dist.barrier()
    began = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - began
    dist.barrier()
    return _largest(seconds), loss


def real(bench: Bench, rounds: int) -> dict[str, Any]:
    """Run all ways in turn."""
    peers = bench.peers()
    cap_bytes = bench.cap_bytes(peers)
    found = bench.plan(cap_bytes)
    theirs = {peer.name: bench.torch(peer) for peer in peers}
    ours = bench.ours(found, cap_bytes)
    ways: Mapping[str, Way] = {"ours": ours.step, **{name: way.step for name, way in theirs.items()}}
    losses = {name: [timed(step)[1]] for name, step in ways.items()}
    apart = {name: _largest(gradient_apart(ours, way)) for name, way in theirs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, step in turned(ways, number):
            took, loss = timed(step)
            seconds[name].append(took)
            losses[name].append(loss)
    peak = _largest(ours.worker.arena.peak_bytes)
    ours.close()
    simulated = {"ours": found.makespan_s, **{peer.name: peer.makespan_s for peer in peers}}
    return {
        "ways": {
            name: {"seconds": seconds[name], "losses": losses[name], "simulated_s": simulated[name]} for name in ways
        },
        "copies_s": bench.copies_s(found),
        "gradients_apart": apart,
        "cap_bytes": cap_bytes,
        "peak_bytes": {"ours": peak, **{peer.name: peer.peak_bytes for peer in peers}},
        "bounds": {peer.name: peer.bounds for peer in peers},
        "loads": {peer.name: device_loads(peer, bench.costs) for peer in peers},
        "plan": {**found.to_json(), "order": None},
        **bounds_of(bench, found),
    }


def bounds_of(bench: Bench, found: RoundPipePlan) -> dict[str, Any]:
    """Return what a model of the machine says of these layers."""
    costs = bench.slot_costs
    again, num = sum(found.partition.backward), bench.shape.microbatches
    return {
        "head_layers": head_layers(bench.costs),
        "vocabulary": bench.model.config.vocab_size,
        "zero_bubble_s": zero_bubble_s(costs, num_devices=RANKS, num_microbatches=num, recomputed_layers=again),
        "costs": bench.costs.to_json(),
    }


def device_loads(peer: Peer, costs: Costs) -> list[float]:
    """Return the seconds of work of each device."""
    spans = simulate(peer.schedule, costs).spans
    return [sum(s.end_s - s.start_s for s in spans if s.device == d and s.action.op in (Op.F, Op.R, Op.B))
            for d in range(RANKS)]  # fmt: skip


def capped(bench: Bench, rounds: int) -> dict[str, Any]:
    """Train a model several times as large as a device; the peer is run without a cap, to compare the losses."""
    costs = bench.costs
    model_bytes = 2 * int(sum(costs.weight_bytes))
    cap_bytes = model_bytes // TIMES_OVER
    peer = bench.peers()[0]
    found = bench.plan(cap_bytes)
    theirs, ours = bench.torch(peer), bench.ours(found, cap_bytes)
    runs = [timed(ours.step) for _ in range(rounds)]
    peak = _largest(ours.worker.arena.peak_bytes)
    ours.close()
    return {
        "model_bytes": model_bytes,
        "cap_bytes": cap_bytes,
        "peak_bytes": peak,
        "peer_bytes": least_bytes(costs),
        "seconds": [seconds for seconds, _ in runs],
        "losses": [loss for _, loss in runs],
        "peer_losses": [timed(theirs.step)[1] for _ in range(rounds)],
        "plan": {**found.to_json(), "order": None},
        "simulated_s": found.makespan_s,
    }


def least_bytes(costs: Costs) -> int:
    """Return the least that the heavier rank of any contiguous split holds: weights and gradients, and nothing else."""
    splits = (max(costs.weights((0, k)), costs.weights((k, costs.num_layers))) for k in range(1, costs.num_layers))
    return 2 * int(min(splits))


PARTS: dict[str, Callable[[Bench, int], dict[str, Any]]] = {"real": real, "capped": capped}


def main() -> None:
    """Join the world of two, measure, let rank 0 write the row."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder.resolve() / 'store'}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    shape = Shape(**options["shape"])
    row = PARTS[options["part"]](Bench(shape, quick=options["quick"]), options["rounds"])
    if rank == 0:
        head = {"part": options["part"], "model": shape.name}
        row = {**head, "tokens": shape.tokens, "microbatches": shape.microbatches, **row}
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
