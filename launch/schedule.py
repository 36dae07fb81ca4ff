"""The learning rate, as a pure function of the step."""

from __future__ import annotations

import math

from launch.config import ScheduleConfig


def learning_rate(step: int, config: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, in a run of `total_steps`.

    It rises linearly, reaching `peak` at step `warmup_steps - 1`, and falls from there to `final_ratio * peak` at the
    last step.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    falling = total_steps - config.warmup_steps
    done = min(1.0, (step - config.warmup_steps + 1) / falling) if falling > 0 else 1.0
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.kind]
    return peak * (config.final_ratio + (1 - config.final_ratio) * shape)
