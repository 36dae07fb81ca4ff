"""What can go wrong in `pipeline`.

PipelineError
    ScheduleError      a schedule that is incomplete, cyclic, over its memory cap or breaks an order; shows the table
    PlanError          a model, cap and set of devices for which there is no plan
    MemoryCapError     an allocation over the device-memory cap; names device, slot and bytes
    StalenessError     weights of another version than the schedule promised; names slot, layer and versions
    WatchdogError      a wait passed its deadline or a peer is gone; names rank, action and peer
"""


class PipelineError(Exception):
    """Base of every error of this package."""


class ScheduleError(PipelineError, ValueError):
    """A schedule that cannot run as asked."""


class PlanError(PipelineError, ValueError):
    """A model, cap and set of devices for which there is no plan."""


class MemoryCapError(PipelineError, RuntimeError):
    """An allocation over the device-memory cap."""


class StalenessError(PipelineError, RuntimeError):
    """Weights of another version than the schedule promised."""


class WatchdogError(PipelineError, RuntimeError):
    """A wait passed its deadline, or a peer is gone."""
