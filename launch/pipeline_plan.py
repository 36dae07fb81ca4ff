"""From the chunks of a step to the schedule of a pipeline: integers in, a frozen plan out, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from chunkflow.records import Chunk
from pipeline.comms import complete
from pipeline.config import PipelineConfig
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import with_recompute
from pipeline.schedules.orders import Candidate, plan_state_aware
from pipeline.trimmed import without_frozen
from pipeline.unit_costs import UnitModel
from pipeline.units import Unit
from pipeline.validate import validate


def units_of(chunks: Sequence[Chunk], retain: int) -> tuple[Unit, ...]:
    """Return what a planner is told of a rank's chunks."""
    return tuple(Unit(c.num_tokens, c.group, c.index, c.count, retain) for c in chunks)


STATE_BYTES = 0.25
"""Keys, values and their gradients of a token in a layer, in what the layer keeps of it for a backward: about."""


def plan_order(units: tuple[Unit, ...], *, ranks: int, pair_cost: float) -> Candidate:
    """Return the quickest order and lead of state-aware 1F1B, simulated, that needs no more memory than the given one.

    Groups and standalone chunks change places as a whole. `pair_cost` is chunkflow's. Where all are alike they stay.
    """
    model = UnitModel(layers=ranks, attention_tokens=1 / pair_cost if pair_cost else inf, state_bytes=STATE_BYTES)
    tried = plan_state_aware(units, model, devices=ranks, retains=(units[0].retain,)).tried
    most = max(tried[0].result.peak_bytes)  # as given, counted in chunks
    return min((c for c in tried if max(c.result.peak_bytes) <= most), key=lambda c: c.result.makespan_s)


def plan_step(
    config: PipelineConfig,
    units: tuple[Unit, ...],
    bounds: tuple[tuple[int, int], ...],
    *,
    first_trained: int = 0,
    ahead: str | None = None,
) -> Schedule:
    """Return the schedule of one step, complete and validated; `bounds` are the layers of each stage.

    Stages before `first_trained` run no backward. `ahead` is the lead of state-aware 1F1B, see `plan_order`.
    Raises PlanError or ScheduleError, with the table, for chunks that do not make one.
    """
    make = SCHEDULES[config.schedule]
    if config.schedule == "state_aware_1f1b":
        schedule = make(devices=config.ranks, units=units, layers=bounds, ahead=ahead or "chunks")
    else:
        extra = {"stages_per_device": config.num_stages // config.ranks} if config.looped else {}
        schedule = make(devices=config.ranks, microbatches=len(units), layers=bounds, **extra)
        schedule = replace(schedule, units=units)
    schedule = complete(with_recompute(schedule) if config.recompute else schedule)
    validate(schedule)  # before it is trimmed: the validator wants an R also where no backward follows
    return without_frozen(schedule, first_trained) if first_trained else schedule
