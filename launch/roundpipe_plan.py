"""How RoundPipe runs a model: slots from the layers' weights, and a schedule for every number of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from launch.pipeline_parts import layer_weight
from launch.split import Layer
from pipeline.config import PipelineConfig
from pipeline.costs import Costs
from pipeline.roundpipe.lowering import slot_schedule, without_optimizer
from pipeline.roundpipe.planner import plan
from pipeline.roundpipe.slots import LayerCosts
from pipeline.schedule import Schedule
from pipeline.schedules.roundpipe import Slots

EFFORT = 0.02
"""Of the planner: about a second."""
_LEAST = 1e-3
"""Cost of a layer without matrices, in those of the heaviest."""
_ROUNDS, _OPEN_SLOTS = (1, 2, 4), (1, 2, 3)
"""What is tried where the configuration leaves them open."""


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """How a model runs, the same on every rank and machine."""

    slots: Slots
    costs: Costs
    """That order the slots."""
    rounds: int
    open_slots: int
    capped: bool
    """Devices have a memory cap."""
    over_ideal: float
    """Simulated time of a step, in times that it would take with no device idle and nothing recomputed."""


def plan_slots(
    layers: Sequence[Layer],
    config: PipelineConfig,
    *,
    microbatches: int,
    first_trained: int,
    kept_bytes: Sequence[int] = (),
    boundary_bytes: int = 0,
) -> SlotPlan:
    """Return the plan of a model; rounds and open slots are those of `config`, or the best where it leaves them open.

    Layers before `first_trained` run no backward. `kept_bytes` are what each layer keeps of a micro-batch, its input
    included, and `boundary_bytes` what one takes between two layers; both matter for a cap only, which is then kept.
    Raises PlanError, with what is needed, when no slots fit the device's memory.
    """
    weights = [layer_weight(layer) for layer in layers]
    least = _LEAST * max(weights)
    seconds = tuple(max(weight, least) / max(weights) for weight in weights)
    body = layers[1:]  # of the embedding, rows are brought, and those of its gradient added on the host
    costs = LayerCosts(
        forward_s=seconds,
        backward_s=tuple(2 * s for s in seconds),
        weight_bytes=(0, *(sum(p.nbytes for p in one.module.parameters()) for one in body)),
        gradient_bytes=(0, *(sum(p.nbytes for p in one.module.parameters() if p.requires_grad) for one in body)),
        activation_bytes=tuple(kept_bytes),
        boundary_bytes=boundary_bytes,
        first_trained=first_trained,
    )
    found = plan(
        costs,
        num_devices=config.ranks,
        num_microbatches=microbatches,
        num_rounds=_ROUNDS if config.rounds is None else (min(config.rounds, microbatches),),
        open_slots=_OPEN_SLOTS if config.open_slots is None else (config.open_slots,),
        memory_cap_bytes=config.device_memory_bytes,
        effort=EFFORT,
    )
    return SlotPlan(
        slots=without_frozen_slots(found.partition, first_trained),
        costs=Costs(forward_s=(seconds,), backward_s=(costs.backward_s,)),
        rounds=config.rounds or len(found.rounds),
        open_slots=found.open_slots,
        capped=config.device_memory_bytes is not None,
        over_ideal=1 / found.useful,
    )


def without_frozen_slots(slots: Slots, first_trained: int) -> Slots:
    """Return slots whose layers before `first_trained` run no backward."""
    left = max(0, sum(slots.forward) - first_trained)
    backward = []
    for size in slots.backward:
        if left > 0:
            backward.append(min(size, left))
            left -= backward[-1]
    return Slots(forward=slots.forward, fused=slots.fused, backward=tuple(backward))


@lru_cache(maxsize=64)
def step_schedule(plan: SlotPlan, *, devices: int, microbatches: int) -> Schedule:
    """Return the schedule of one step, complete and validated; the optimizer is left to the job."""
    return without_optimizer(steps_schedule(plan, devices=devices, microbatches=(microbatches,), staleness=0))


@lru_cache(maxsize=64)
def steps_schedule(plan: SlotPlan, *, devices: int, microbatches: tuple[int, ...], staleness: int) -> Schedule:
    """Return the schedule of several steps that overlap, with the optimizer's; `microbatches` are those of each."""
    return slot_schedule(
        plan.slots,
        devices=devices,
        microbatches=microbatches,
        rounds=min(plan.rounds, max(microbatches)),
        costs=plan.costs,
        open_slots=plan.open_slots,
        capped=plan.capped,
        staleness=staleness,
    )
