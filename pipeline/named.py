"""A schedule from a few settings: what commands and recipes ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pipeline.costs import Costs
from pipeline.errors import PlanError, ScheduleError
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import balanced_stages, with_recompute
from pipeline.schedules.dispatch import ready_first
from pipeline.torch_csv import load_csv

_STAGES_PER_DEVICE = {"interleaved": 2, "looped_bfs": 2, "zbv": 2}


def stages_of(name: str, devices: int, stages: int | None) -> int:
    """How many stages a weight-bound schedule has; `stages` where given, if it can have that many.

    Raises ScheduleError if it cannot.
    """
    usual = devices * _STAGES_PER_DEVICE.get(name, 1)
    if stages is None:
        return usual
    free = name in ("interleaved", "looped_bfs")
    if (free and (stages < devices or stages % devices)) or (not free and stages != usual):
        need = f"a multiple of {devices}" if free else str(usual)
        raise ScheduleError(f"{name} on {devices} ranks got {stages} stages; it has {need}")
    return stages


def named_schedule(
    name: str,
    *,
    devices: int,
    microbatches: int,
    costs: Costs | None = None,
    stages: int | None = None,
    recompute: bool = False,
    rounds: int = 1,
    open_slots: int = 1,
) -> Schedule:
    """The schedule `name`, its stages balanced by `costs`, or of one layer each.

    `recompute` is for weight-bound schedules; `rounds` and `open_slots` are for RoundPipe, which always recomputes.

    Raises PlanError for names it does not know, ScheduleError for numbers that do not fit.
    """
    if name not in SCHEDULES:
        raise PlanError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if name == "roundpipe":
        if costs is not None and stages is not None:
            raise PlanError(
                f"roundpipe got {stages} stages and costs of {costs.num_layers} layers; leave the stages out"
            )
        layers = costs.num_layers if costs is not None else stages
        schedule = SCHEDULES[name](devices=devices, microbatches=microbatches, layers=layers, rounds=rounds)
        if open_slots > 1:
            schedule = ready_first(schedule, costs or Costs.uniform(schedule.num_layers), open_slots=open_slots)
        return schedule
    if rounds != 1 or open_slots != 1:
        raise ScheduleError(f"{name} has no rounds ({rounds}) and no open slots ({open_slots}); roundpipe has")
    count = stages_of(name, devices, stages)
    more: dict[str, Any] = {"stages_per_device": count // devices} if name in ("interleaved", "looped_bfs") else {}
    if costs is not None:
        layer_s = [f * (1 + recompute) + b for f, b in zip(*costs.mean_s(), strict=True)]
        more["layers"] = balanced_stages(layer_s, count)
    schedule = SCHEDULES[name](devices=devices, microbatches=microbatches, **more)
    return with_recompute(schedule) if recompute else schedule


def read_schedule(path: Path) -> Schedule:
    """A schedule from a file: JSON (a plan of RoundPipe too), the CSV of torch.distributed.pipelining, or text.

    Raises PlanError if the file cannot be read, ScheduleError for what is in it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read the schedule {path}: {e}") from e
    if path.suffix == ".csv":
        return load_csv(text, name=path.stem)
    return _of_json(text) if path.suffix == ".json" else Schedule.from_text(text)


def _of_json(text: str) -> Schedule:
    """A schedule, or the schedule of a plan that `python -m pipeline plan --json` printed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None  # what is wrong with it says the schedule's own reader
    if not isinstance(value, dict) or "partition" not in value:
        return Schedule.from_json(text)
    # Compiling takes seconds, which a schedule need not pay.
    from pipeline.roundpipe.planner import RoundPipePlan

    return RoundPipePlan.from_json(cast("dict[str, Any]", value)).schedule()
