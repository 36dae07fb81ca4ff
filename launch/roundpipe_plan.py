"""How RoundPipe runs a model: slots from the layers' weights, and a schedule for every number of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
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


def plan_slots(
    layers: Sequence[Layer],
    config: PipelineConfig,
    *,
    microbatches: int,
    first_trained: int,
    activation_bytes: Sequence[float] = (),
) -> tuple[Slots, Costs]:
    """Return the slots of a model, and the costs that order them. Pure: the same on every rank and machine.

    Layers before `first_trained` run no backward. `activation_bytes` are what each layer keeps of a micro-batch.
    Raises PlanError when no slots fit the device's memory.
    """
    weights = [layer_weight(layer) for layer in layers]
    least = _LEAST * max(weights)
    seconds = tuple(max(weight, least) / max(weights) for weight in weights)
    nbytes = tuple(sum(p.nbytes for p in layer.module.parameters()) for layer in layers)
    nbytes = (0, *nbytes[1:])  # of the embedding, rows are brought
    costs = LayerCosts(
        forward_s=seconds,
        backward_s=tuple(2 * s for s in seconds),
        weight_bytes=nbytes,
        activation_bytes=tuple(map(int, activation_bytes)),
    )
    found = plan(
        costs,
        num_devices=config.ranks,
        num_microbatches=microbatches,
        num_rounds=(min(config.rounds, microbatches),),
        open_slots=(config.open_slots,),
        memory_cap_bytes=config.device_memory_bytes,
        effort=EFFORT,
    )
    general = Costs(forward_s=(seconds,), backward_s=(costs.backward_s,))
    return without_frozen_slots(found.partition, first_trained), general


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
def step_schedule(
    slots: Slots, costs: Costs, *, devices: int, microbatches: int, rounds: int, open_slots: int
) -> Schedule:
    """Return the schedule of one step, complete and validated; the optimizer is left to the job."""
    return without_optimizer(
        slot_schedule(
            slots,
            devices=devices,
            microbatches=microbatches,
            rounds=min(rounds, microbatches),
            costs=costs,
            open_slots=open_slots,
        )
    )
