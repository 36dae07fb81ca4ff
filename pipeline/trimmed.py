"""A schedule with less in it: forwards only, or no backward where nothing is trained. Pure."""

from __future__ import annotations

from pipeline.actions import Action, Op, Phase
from pipeline.errors import ScheduleError
from pipeline.schedule import Schedule

_BACKWARD = frozenset({Op.B, Op.I, Op.W, Op.R})


def forward_only(schedule: Schedule) -> Schedule:
    """Return the forwards of a schedule and the messages between them, for an evaluation."""
    rows = [[a for a in row if a.op is Op.F or a.phase is Phase.F] for row in schedule.devices]
    return schedule.with_devices(rows, name=f"{schedule.name}, forward only")


def without_frozen(schedule: Schedule, first_trained: int) -> Schedule:
    """Return a schedule whose stages before `first_trained` run no backward, since nothing in them is trained.

    Raises ScheduleError when no stage is trained.
    """
    if first_trained >= schedule.num_stages:
        raise ScheduleError(
            f"none of the {schedule.num_stages} stages of {schedule.name} has a parameter that is trained; unfreeze "
            "some, or run it forward only"
        )
    rows = [[a for a in row if not _needless(a, first_trained)] for row in schedule.devices]
    return schedule.with_devices(rows, first_trainable=schedule.stages[first_trained][0])


def _needless(action: Action, first_trained: int) -> bool:
    if action.op in _BACKWARD:
        return action.stage < first_trained
    if action.phase is not Phase.B:
        return False
    return action.stage < first_trained or (action.op is Op.SEND and action.stage == first_trained)
