"""Every layout of a job on a machine, bounded, simulated where it may be the best, and the best with its reasons.

A layout is bounded from below by the work of its busiest data-parallel rank. The most promising are simulated first,
and those that cannot be faster than the best so far are not. Pure, and the same for the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow.config import PlannerConfig
from chunkflow.layout import Layout as Chunks
from chunkflow.layout import make_layout
from chunkflow.sampler import global_batch
from launch.compose import EngineName, cell
from launch.errors import ConfigError
from launch.pipeline_plan import units_of
from launch.plan_costs import ADAM, FP32, CostModel
from launch.plan_records import Estimate, Layout, Step, size
from pipeline.comms import complete
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import balanced_stages
from pipeline.simulate import Result, simulate
from pipeline.units import Unit

MAX_ACTIONS = 8_000
"""Of a simulated step; layouts with more are told to take what they take with longer chunks."""
MOST = 32
"""Layouts that are simulated to find the best."""
FULLEST = -1
"""In place of a step's number: the first step with the longest sample of all in it, which memory has to hold."""
STAGES = {"interleaved": 2, "zbv": 2}
"""Stages a rank, where that is not one."""


@dataclass(frozen=True)
class Planner:
    """Lays a job out. `lengths` int64 [N] are the samples', in tokens."""

    model: CostModel
    lengths: NDArray[np.int64]
    batch: int
    seed: int
    features: tuple[str, ...]
    """Of the recipe, as `launch.compose` names them, what a layout decides left out."""
    steps: int = 2
    known: dict[Layout, Estimate] = field(default_factory=dict)
    """Layouts that were simulated."""
    cuts: dict[tuple[int, int, int, int], Chunks] = field(default_factory=dict)
    """Samples that were cut, by step, chunk_tokens, retain and ranks."""

    def layouts(self) -> Iterator[Layout]:
        """Yield every layout that composes with the recipe."""
        devices, whole = self.model.machine.devices, len(self.model.sizes.layers)
        longest = int(self.lengths.max())
        sizes = [size for n in range(8, 18) if (size := 1 << n) < 2 * longest] or [256]
        for pp in (n for n in range(1, min(devices, whole) + 1) if devices % n == 0):
            for chunk_tokens in sizes:
                split = longest > chunk_tokens
                for schedule, engine, ep in self._ways(pp, devices // pp, split=split):
                    for retain in (1, 2, 4) if split else (1,):
                        yield Layout(
                            pp=pp, ep=ep, data=devices // pp, engine=engine, schedule=schedule,
                            chunk_tokens=chunk_tokens, retain=retain,
                        )  # fmt: skip

    def _ways(self, pp: int, data: int, *, split: bool) -> Iterator[tuple[str, EngineName, int]]:
        names = {"state_aware_1f1b": "state_aware", "interleaved": "whole", "zb_h1": "whole", "zbv": "whole"}
        if pp > 1:
            for schedule, name in names.items():
                stages = pp * STAGES.get(schedule, 1)
                if self._composes(name, "ddp", *(["split"] * split)) and stages <= len(self.model.sizes.layers):
                    yield schedule, "ddp", 1
            return
        engines: tuple[EngineName, ...] = ("ddp", "fsdp2", "zero1", "zero3")
        for engine in engines:
            if self._composes(engine) and (data > 1 or engine == "ddp"):
                yield "state_aware_1f1b", engine, 1
        experts = self.model.sizes.num_experts
        if experts > 1 and self._composes("ddp", "experts"):
            for ep in (n for n in range(2, experts + 1) if experts % n == 0 and data % n == 0):
                yield "state_aware_1f1b", "ddp", ep

    def _composes(self, *names: str) -> bool:
        every = (*names, *self.features)
        found = (cell(a, b) for a in every for b in every if a != b)
        return all(one is None or one.reason is None for one in found)

    def bound_s(self, layout: Layout) -> float:
        """Return seconds that no schedule of a layout beats."""
        loads = float(np.mean([chunks.loads.max() for chunks in self.chunks(layout)]))
        work = loads * self.model.token_s * (1 + self.model.backward) / 3 * self._share(layout)
        return work + self.reduce_s(layout, layout.ep)

    def guess_s(self, layout: Layout) -> float:
        """Return about what a step takes: a pipeline that fills and drains once, experts that hide nothing."""
        counts = [chunks.counts[chunks.rank == chunks.loads.argmax()].sum() for chunks in self.chunks(layout)]
        count, reduce_s = float(np.mean(counts)), self.reduce_s(layout, layout.ep)
        fill = (layout.pp - 1) / STAGES.get(layout.schedule, 1)
        exchange = self.model.exchange_s(layout.chunk_tokens, layout.ep) * count if layout.ep > 1 else 0.0
        own = (
            self.model.machine.overhead_s * len(self.model.sizes.layers) * (1 + self.model.backward) * count / layout.pp
        )
        return (self.bound_s(layout) - reduce_s + exchange + own) * (count + fill) / count + reduce_s

    def _share(self, layout: Layout) -> float:
        """Return the least share of any chunk's work that the busiest device of a pipeline has."""
        layers = self.model.sizes.layers
        products, decoders = sum(self.model.layer_s), sum(layer.kind == "decoder" for layer in layers)
        found = np.zeros((layout.pp, 2))
        for device, (lo, hi) in self._places(layout):
            pairs = sum(layer.kind == "decoder" for layer in layers[lo:hi]) / decoders
            found[device] += (sum(self.model.layer_s[lo:hi]) / products, pairs)
        return max(1 / layout.pp, float(found.min(1).max()))

    def chunks(self, layout: Layout) -> list[Chunks]:
        """Return how each step's samples are cut and assigned."""
        return [self.cut(n, layout) for n in range(self.steps)]

    def cut(self, step: int, layout: Layout) -> Chunks:
        """Return how one step's samples are cut and assigned; steps behind the first epoch's are its own again."""
        chunk_tokens, retain, data = layout.chunk_tokens, layout.retain, layout.data
        key = (step, chunk_tokens, retain, data)
        if key not in self.cuts:
            size = min(self.batch, len(self.lengths))
            at = max(step, 0) % max(1, len(self.lengths) // size)
            samples = np.array(global_batch(self.seed, 0, at, num_samples=len(self.lengths), global_batch=size))
            if step == FULLEST:
                samples[self.lengths[samples].argmax()] = self.lengths.argmax()
            config = PlannerConfig(chunk_tokens=chunk_tokens, retain=retain, pair_cost=self.model.pair_cost)
            self.cuts[key] = make_layout(samples, self.lengths[samples], config=config, world_size=data)
        return self.cuts[key]

    def held_bytes(self, layout: Layout) -> list[float]:
        """Return bytes of weights, gradients and moments of each rank of a pipeline."""
        layers = self.model.sizes.layers
        found = [0.0] * layout.pp
        for device, (lo, hi) in self._places(layout):
            found[device] += self.model.held_bytes(layers[lo:hi], engine=layout.engine, ranks=layout.data, ep=layout.ep)
        if layout.pp > 1:  # a tied weight is on the first rank as well as on that of the head
            found[0] += self.model.sizes.tied * (FP32 if self.model.lora else 2 * FP32 + ADAM)
        return found

    def _places(self, layout: Layout) -> Iterator[tuple[int, tuple[int, int]]]:
        for stage, bounds in enumerate(self.bounds(layout)):
            yield min(stage, 2 * layout.pp - 1 - stage) if layout.schedule == "zbv" else stage % layout.pp, bounds

    def bounds(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """Return the layers of each stage."""
        return _stages(self.model.layer_s, layout.pp * STAGES.get(layout.schedule, 1) if layout.pp > 1 else 1)

    def reduce_s(self, layout: Layout, ep: int) -> float:
        """Return seconds of moving weights and gradients, of the slowest stage."""
        layers, passes = self.model.sizes.layers, 0
        if layout.engine == "zero3":
            passes = max(self._passes(chunks, layout.retain) for chunks in self.chunks(layout))
        one = {"engine": layout.engine, "ranks": layout.data, "ep": ep, "passes": passes}
        return max(self.model.reduce_s(layers[lo:hi], **one) for lo, hi in self.bounds(layout))

    @staticmethod
    def _passes(chunks: Chunks, retain: int) -> int:
        """Return forwards, and twice the backwards, of the rank that runs most: the others run along."""
        again = np.maximum(chunks.counts - retain, 0) * (chunks.counts > 1)
        return int(np.bincount(chunks.rank, weights=again + 3 * chunks.counts).max())

    def estimate(self, layout: Layout) -> Estimate:
        """Predict a step of a layout, by the simulator."""
        if layout not in self.known:
            self.known[layout] = self._estimate(layout)
        return self.known[layout]

    def _estimate(self, layout: Layout) -> Estimate:
        steps = [self.step(layout, chunks) for chunks in self.chunks(layout)]
        balance = [float(chunks.loads.mean() / chunks.loads.max()) for chunks in self.chunks(layout)]
        reduce_s = self.reduce_s(layout, layout.ep)
        return Estimate(
            layout=layout,
            step_s=float(np.mean([step.seconds for step in steps])) + reduce_s,
            bubble=float(np.mean([step.bubble for step in steps])) if layout.pp > 1 else 0.0,
            balance=float(np.mean(balance)),
            reduce_s=reduce_s,
            held_bytes=max(self.held_bytes(layout)),
            memory_bytes=max(*(step.memory_bytes for step in steps), self._run(layout, self.cut(FULLEST, layout))[1]),
            simulated=all(step.simulated for step in steps),
        )

    def step(self, layout: Layout, chunks: Chunks) -> Step:
        """Predict one step, by the simulator, from the data-parallel rank that has most work."""
        result, memory = self._run(layout, chunks)
        seconds, bubble = self._coarser(layout) if result is None else (result.makespan_s, result.bubble.total)
        return Step(seconds=seconds, bubble=bubble, memory_bytes=memory, simulated=result is not None)

    def _run(self, layout: Layout, chunks: Chunks) -> tuple[Result | None, float]:
        """Simulate the rank that has most work, unless it has too much; return that and the fullest device's bytes."""
        held, stages = self.held_bytes(layout), self.bounds(layout)
        row = chunks.chunks(chunks.jobs()[int(chunks.loads.argmax())].tolist())
        costs = self.model.costs(row, ep=layout.ep, chunk_tokens=layout.chunk_tokens, engine=layout.engine)
        if 4 * len(stages) * len(row) > MAX_ACTIONS:
            open_share = (layout.pp + layout.retain) / layout.pp  # chunks a device keeps, times its share of layers
            kept = max(map(sum, costs.activation_bytes)) * open_share
            return None, max(held) + kept + sum(map(sum, costs.state_bytes)) / layout.pp
        result = simulate(complete(_schedule(layout, units_of(row, layout.retain), stages)), costs)
        return result, max(a + b for a, b in zip(held, result.peak_bytes, strict=True))

    def _coarser(self, layout: Layout) -> tuple[float, float]:
        """Return seconds and bubble of a layout with too many chunks to simulate: those of chunks twice as long."""
        if layout.chunk_tokens >= int(self.lengths.max()):  # nothing becomes fewer any more
            count = float(np.mean([chunks.num_chunks / layout.data for chunks in self.chunks(layout)]))
            guess = self.guess_s(layout) - self.reduce_s(layout, layout.ep)
            return guess, (layout.pp - 1) / (count + layout.pp - 1)
        found = self.estimate(replace(layout, chunk_tokens=2 * layout.chunk_tokens))
        least = self.bound_s(layout) - self.reduce_s(layout, layout.ep)  # shorter chunks run more of them twice
        return max(least, found.step_s - found.reduce_s), found.bubble

    def fits(self, estimate: Estimate) -> bool:
        """Return whether a layout stays within the memory of a device."""
        return estimate.memory_bytes <= self.model.machine.memory_bytes

    def best(self) -> Estimate:
        """Return the fastest layout that fits. Raises ConfigError, with what the smallest needs, when none does."""
        cap = self.model.machine.memory_bytes
        every = list(self.layouts())
        held = {layout: max(self.held_bytes(layout)) for layout in every}
        room = sorted((layout for layout in every if held[layout] < cap), key=self.guess_s)
        found: Estimate | None = None
        for layout in room:
            if found is not None and (self.bound_s(layout) >= found.step_s or len(self.known) >= MOST):
                continue
            estimate = self.estimate(layout)
            if self.fits(estimate) and (found is None or estimate.step_s < found.step_s):
                found = estimate
        if found is None:
            tried = [one.memory_bytes for one in self.known.values()] or list(held.values())
            raise ConfigError(
                f"no layout on {self.model.machine.devices} devices stays within {size(cap)}; the smallest needs "
                f"{size(min(tried))}. Give more or larger devices, or train adapters (lora.rank)"
            )
        return found

    def fastest(self) -> Estimate:
        """Return the fastest layout of those that were simulated and fit; one must."""
        return min((one for one in self.known.values() if self.fits(one)), key=lambda one: one.step_s)

    def others(self, best: Estimate) -> dict[str, list[Estimate]]:
        """Return, for each dimension of a layout, the nearest other values of it, in the layouts that tell of each.

        These are what was simulated already and what promises most; with another number of pipeline ranks everything
        else may be another, too.
        """
        found: dict[str, list[Estimate]] = {}
        every = list(self.layouts())
        for name in _DIMENSIONS:
            fixed = [other for other in _DIMENSIONS if name not in ("pp", other)]
            same = [one for one in every if all(getattr(one, f) == getattr(best.layout, f) for f in fixed)]
            for value in _nearest(getattr(best.layout, name), {getattr(one, name) for one in same}):
                choices = [one for one in same if getattr(one, name) == value]
                fitting = [one for one in choices if max(self.held_bytes(one)) < self.model.machine.memory_bytes]
                told = [one for one in choices if one in self.known] + [min(fitting or choices, key=self.guess_s)]
                found.setdefault(name, []).extend(self.estimate(one) for one in told)
        return found


_DIMENSIONS = ("pp", "ep", "engine", "schedule", "chunk_tokens", "retain")


def _nearest(chosen: Any, values: set[Any]) -> list[Any]:
    """Return the values before and after the chosen one; of names, all others."""
    ordered = sorted(values - {chosen})
    if not ordered or isinstance(chosen, str):
        return ordered
    return [*[v for v in ordered if v < chosen][-2:], *[v for v in ordered if v > chosen][:2]]


@lru_cache(maxsize=128)
def _stages(layer_s: tuple[float, ...], stages: int) -> tuple[tuple[int, int], ...]:
    return balanced_stages(layer_s, stages)


def _schedule(layout: Layout, units: Sequence[Unit], stages: tuple[tuple[int, int], ...]) -> Any:
    if layout.schedule == "state_aware_1f1b":
        return SCHEDULES[layout.schedule](devices=layout.pp, units=tuple(units), layers=stages)
    extra = {"stages_per_device": STAGES[layout.schedule]} if layout.schedule == "interleaved" else {}
    made = SCHEDULES[layout.schedule](devices=layout.pp, microbatches=len(units), layers=stages, **extra)
    return replace(made, units=tuple(units))
