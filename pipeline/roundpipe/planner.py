"""Choose how RoundPipe runs a model: rounds, partition, fused layers, open slots and the order of dispatch.

For each number of rounds and of open slots even cuts are simulated, the best few and a coarse one annealed; the setting
with the shortest makespan is then searched longer, also with few layers in the fused slot. Of what is as good as the
shortest (`AS_GOOD`), the plan whose devices idle least is taken: it fuses fewer layers, so that a device keeps fewer
activations. Pure: the same costs and seed give every rank the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import index
from typing import Any

import numpy as np

from pipeline.errors import PlanError
from pipeline.roundpipe.search import Problem, Tables, even_cuts, few_fused, finest_cut, search
from pipeline.roundpipe.slots import LayerCosts, Op, check_model, rounds_of
from pipeline.schedule import Schedule
from pipeline.schedules.roundpipe import Slots, roundpipe

SURVEY_OPS, SETTLE_OPS = 1_200_000_000, 3_600_000_000
"""Simulated operations for looking at every setting, and for the best one: some seconds together."""
LARGE, LESS = 1_536, 0.25
"""Layers times micro-batches up to which a search has all of these, and the power by which it has fewer of more."""
LEAST_SLOTS = 0.26
"""Slots of an evaluation, at least, in layers: the search goes from few large slots to many, and is billed for them."""
HOT = (0.32, 0.12)
"""First temperatures, in shares of the ideal makespan of a layer: a coarse search, one that keeps more of its start."""
AS_GOOD = 0.005
"""How much longer than the shortest a step may be for the sake of a smaller bubble."""
SEEN = 64
"""How often a search may look at as many partitions as there are: a model of a few layers needs no more."""
STARTS, SETTLED = 1, 4
"""Even cuts to start from, for each number of fused layers; results of the survey to search from longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPipePlan:
    """How one optimizer step runs, and what the simulation of it says."""

    num_devices: int
    rounds: tuple[int, ...]
    """Micro-batches in each round."""
    open_slots: int
    partition: Slots
    order: tuple[tuple[Op, ...], ...]
    """What each device runs, in order. Every rank follows this, not what happens to be ready."""
    makespan_s: float
    bubble: float
    """Idle share of the devices' time, recomputation counted as work (as published)."""
    useful: float
    """Share of the devices' time in forward and backward, recomputation not counted."""
    peak_bytes: int
    """Most bytes on a device, as the runtime counts them: weights and gradients of its open slots, one micro-batch of
    one of them with its input and gradients, and the weights of the next. 0 if the costs say nothing of bytes."""
    reasons: tuple[str, ...] = ()

    def schedule(self, *, steps: int = 1, staleness: int = 0) -> Schedule:
        """Return the plan as a schedule, which validates, simulates, prints and runs like any other."""
        return roundpipe(
            devices=self.num_devices,
            microbatches=sum(self.rounds),
            slots=self.partition,
            rounds=len(self.rounds),
            steps=steps,
            staleness=staleness,
            order=[[(op.slot, op.microbatch) for op in ops] for ops in self.order],
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RoundPipePlan:
        """Read what `to_json` made, also after a trip through text.

        Raises PlanError for anything else.
        """
        try:
            cut = data["partition"]
            found = cls(
                **{
                    **data,
                    "partition": Slots(
                        forward=tuple(map(index, cut["forward"])),
                        fused=index(cut["fused"]),
                        backward=tuple(map(index, cut["backward"])),
                    ),
                    "order": tuple(
                        tuple(Op(**{name: index(x) for name, x in op.items()}) for op in ops) for ops in data["order"]
                    ),
                    "rounds": tuple(map(index, data["rounds"])),
                    "reasons": tuple(map(str, data["reasons"])),
                }
            )
            found.schedule()
        except (TypeError, LookupError, AttributeError, ValueError) as e:
            if isinstance(e, PlanError):
                raise
            raise PlanError(f"this is no plan of RoundPipe as JSON: {type(e).__name__}: {str(e)[:200]}") from e
        return found


def evaluate(problem: Problem, partition: Slots) -> RoundPipePlan:
    """Simulate one partition and return it as a plan with its order of dispatch.

    Raises:
        PlanError: The partition is not one of this model, or needs more than the memory cap.
    """
    check_model(problem.costs, partition, problem.rounds, problem.num_devices)
    tables = Tables(problem)
    makespan_s, rows = tables.order(partition)
    peak = tables.peak(partition)
    cap = problem.memory_cap_bytes
    if cap is not None and peak > cap:
        raise PlanError(f"the partition needs {peak:,} bytes on a device, the cap is {cap:,}; cut finer or raise it")
    order: list[list[Op]] = [[] for _ in range(problem.num_devices)]
    for device, g, microbatch in rows:
        order[device].append(Op(int(g) // partition.num_slots, int(g) % partition.num_slots, int(microbatch)))
    return RoundPipePlan(
        num_devices=problem.num_devices,
        rounds=problem.rounds,
        open_slots=problem.open_slots,
        partition=partition,
        order=tuple(tuple(ops) for ops in order),
        makespan_s=makespan_s,
        bubble=idle_share(problem, partition, makespan_s),
        useful=problem.costs.useful_s * sum(problem.rounds) / (makespan_s * problem.num_devices),
        peak_bytes=peak,
    )


def anneal_all(
    problem: Problem, starts: Sequence[Slots], hot: Sequence[float], *, seed: int, operations: float
) -> list[tuple[float, Slots]]:
    """Anneal every start at every temperature within a budget; return (seconds, partition), best first."""
    runs = list(product(starts, hot))
    share = operations / len(runs) * (1 / problem.operation_cost)
    found, most = [], SEEN * 4**problem.costs.num_layers
    for i, (start, temperature) in enumerate(runs):
        num_slots = max(start.num_slots, LEAST_SLOTS * problem.costs.num_layers)
        evaluations = min(most, int(share / (sum(problem.rounds) * num_slots)))
        found.append(
            search(problem, start, seed=seed + i, evaluations=evaluations, hot=temperature / problem.costs.num_layers)
        )
    return sorted(found, key=lambda pair: pair[0])


def settle(problem: Problem, found: Sequence[tuple[float, Slots]], *, seed: int, operations: float) -> Slots:
    """Search one setting longer, from the (seconds, partition) of a survey, best first; return what is to be run.

    Where the number of fused layers is free, part of the search has few of them.
    """
    problems = [problem]
    if problem.fused is None:
        problems += [replace(problem, fused=f) for f in few_fused(problem)]
    every = list(found)
    for one in problems:
        cuts = dict.fromkeys(cut for _, cut in found if one.fused in (None, cut.fused))
        starts = list(cuts)[: SETTLED // len(problems) + 1] or even_cuts(one, STARTS)
        every += anneal_all(one, starts, HOT[-1:], seed=seed, operations=operations / len(problems))
    shortest_s = min(seconds for seconds, _ in every)
    good = dict.fromkeys(cut for seconds, cut in every if seconds <= (1 + AS_GOOD) * shortest_s)
    tables = Tables(problem)
    times = {cut: tables.makespan_s(cut) for cut in good}
    return min(good, key=lambda cut: (idle_share(problem, cut, times[cut]), times[cut]))


def idle_share(problem: Problem, partition: Slots, makespan_s: float) -> float:
    """Return the bubble of a makespan: recomputation is work, as published."""
    num = sum(problem.rounds)
    recomputed = sum(problem.costs.forward_s[: sum(partition.backward)]) * num
    return 1 - (problem.costs.useful_s * num + recomputed) / (makespan_s * problem.num_devices)


def plan(
    costs: LayerCosts,
    *,
    num_devices: int,
    num_microbatches: int | Sequence[int],
    num_rounds: Sequence[int] = (1, 2),
    open_slots: Sequence[int] = (1, 2, 3),
    fused: int | None = None,
    memory_cap_bytes: int | None = None,
    effort: float = 1.0,
    seed: int = 0,
    unit: str = "s",
) -> RoundPipePlan:
    """Return the plan with the shortest simulated makespan of one synchronous optimizer step, or one as good.

    Args:
        costs: What each layer costs for one micro-batch.
        num_devices: Stateless workers.
        num_microbatches: Micro-batches of a step. Of several numbers, the costs are of the first, and with others its
            tokens are dealt to so many micro-batches. What a device loses on few tokens is not in the costs.
        num_rounds: Numbers of rounds to try.
        open_slots: Open slots a device to try; 1 is strict slot order.
        fused: Layers of the fused slot, where they are given.
        memory_cap_bytes: Most bytes on a device, as `RoundPipePlan.peak_bytes` counts them.
        effort: Scales the evaluations of the search; 1 is some seconds.
        seed: Of the search, which is bounded by evaluations and so the same on every rank.
        unit: What the reasons call the unit of the costs.

    Raises:
        PlanError: The finest cut is over the memory cap (it says what would do), or the numbers make no schedule.
    """
    base = Problem(
        costs=costs, rounds=(), num_devices=num_devices, open_slots=1, fused=fused, memory_cap_bytes=memory_cap_bytes
    )
    numbers = (num_microbatches,) if isinstance(num_microbatches, int) else tuple(num_microbatches)
    deals = {rounds_of(m, n): costs.dealt(numbers[0] / m) for m in numbers for n in num_rounds if n <= m}
    settings = [
        replace(base, costs=c, rounds=r, open_slots=k) for (r, c), k in product(deals.items(), sorted(set(open_slots)))
    ]
    settings = settings if memory_cap_bytes is None else fitting(settings, memory_cap_bytes)
    effort *= min(1.0, (LARGE / (costs.num_layers * max(numbers))) ** LESS)
    survey = []
    for problem in settings:
        cuts = even_cuts(problem, STARTS)
        if memory_cap_bytes is not None:  # so that one that fits is among those found
            cuts.append(finest_cut(problem))
        found = anneal_all(problem, cuts, HOT, seed=seed, operations=effort * SURVEY_OPS / len(settings))
        survey.append((found[0][0], problem, found))
    _, problem, found = min(survey, key=lambda entry: entry[0])
    best = evaluate(problem, settle(problem, found, seed=seed + 1000, operations=effort * SETTLE_OPS))
    others = [(t, p) for t, p, _ in survey if p is not problem]
    return replace(best, reasons=reasons(best, others, problem.costs, unit))


def fitting(settings: Sequence[Problem], memory_cap_bytes: int) -> list[Problem]:
    """Return the settings whose finest cut is within the cap. Raises PlanError, with what is needed, for none."""
    needs = [Tables(problem).peak(finest_cut(problem)) for problem in settings]
    least = min(needs)
    if least <= memory_cap_bytes:
        return [problem for problem, need in zip(settings, needs, strict=True) if need <= memory_cap_bytes]
    problem = settings[needs.index(least)]
    heaviest, nbytes = heaviest_layer(problem.costs)
    fewer = " or fewer open slots" if problem.open_slots > 1 else ""
    raise PlanError(
        f"{problem.open_slots} open slot(s) need {least:,} bytes on a device even where every layer is a slot: "
        f"weights, gradients, one micro-batch and the next slot's weights (layer {heaviest} has {nbytes:,} of them); "
        f"the cap is {memory_cap_bytes:,}; raise it to {least:,}, or use smaller micro-batches{fewer}"
    )


def heaviest_layer(costs: LayerCosts) -> tuple[int, int]:
    """Return the layer with most weights, gradients and activations, and their bytes."""
    none = (0,) * costs.num_layers
    weights = costs.weight_bytes or none
    rows = (weights, costs.gradient_bytes or weights, costs.activation_bytes or none)
    needs = [sum(layer) for layer in zip(*rows, strict=True)]
    worst = max(range(costs.num_layers), key=needs.__getitem__)
    return worst, needs[worst]


def reasons(
    best: RoundPipePlan, others: Sequence[tuple[float, Problem]], costs: LayerCosts, unit: str
) -> tuple[str, ...]:
    """Say in words why this plan, and what bounds it."""
    num = sum(best.rounds)
    mean_s = costs.useful_s * num / best.num_devices
    slots = best.partition.num_slots
    hop = costs.transfer_s / (best.makespan_s / max(1, slots * num / best.num_devices))
    lines = [
        f"{len(best.rounds)} round(s) of {best.rounds} micro-batches, {best.open_slots} open slot(s): "
        f"{best.makespan_s:.4g} {unit}, {best.makespan_s / mean_s:.3f} times the bound without idling or recomputation",
        f"{slots} slots on {best.num_devices} devices; the fused slot holds {best.partition.fused} layer(s), "
        f"which are not recomputed",
        f"a hop costs {hop:.2f} of a mean slot: no bubble needs {best.num_devices * (1 + hop):.1f} micro-batches",
    ]
    lines += [
        f"{len(problem.rounds)} round(s) of {problem.rounds}, {problem.open_slots} open slot(s): {t:.4g} {unit}, "
        f"{t / best.makespan_s - 1:+.1%}"
        for t, problem in sorted(others, key=lambda pair: pair[0])
    ]
    return tuple(lines)


def zero_bubble_s(costs: LayerCosts, *, num_devices: int, num_microbatches: int, recomputed_layers: int) -> float:
    """Return the makespan of no idle time at all, with the first layers recomputed."""
    again = float(np.sum(costs.forward_s[:recomputed_layers]))
    return (costs.useful_s + again) * num_microbatches / num_devices
