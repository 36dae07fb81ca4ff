"""A loss that is no number ends a job before it reaches the weights, or a checkpoint."""

from __future__ import annotations

import math

from launch.errors import TrainingError


def require_finite(step: int, loss: float, norm: float) -> None:
    """Raise TrainingError unless both are numbers."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}; the last checkpoint is intact: "
            "resume with a lower optimizer.lr, or look at the samples of that step"
        )


def require_finite_evaluation(step: int, loss: float) -> float:
    """Return the held-out loss behind a step. Raises TrainingError, before those weights are saved, for no number."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the held-out loss behind it is {loss}, so its weights are of no use, and are not saved; "
            "resume from before with a lower optimizer.lr, or look at the model and its held-out samples"
        )
    return loss
