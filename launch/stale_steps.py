"""Steps of a job that overlap: RoundPipe with staleness 1 runs those between two evaluations or checkpoints together.

A step then begins while the one before it is still stepped on the host, on weights without it. What runs together ends
on the newest weights, with nothing under way: so what is evaluated, saved and resumed has no pending gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from chunkflow import StepBatch
from launch.bounded import lost_rank_told
from launch.config import FinetuneConfig
from launch.errors import TrainingError
from launch.job import Job, measured
from launch.metrics import StepMetrics
from launch.optimizer import apply_settings
from launch.roundpipe_runner import RoundPipeRunner
from launch.schedule import learning_rate
from launch.step_times import over_ranks

MOST_TOGETHER = 16
"""Steps that are loaded at once. Runs end at its multiples, whatever step a job was resumed at."""


def steps_together(config: FinetuneConfig, step: int, total: int) -> int:
    """Return how many steps behind step `step` run together: up to the next evaluation, checkpoint or multiple.

    A function of the settings and the step, so that a resumed job forms the runs of one that never stopped.
    """
    if not config.pipeline.staleness:
        return 1
    periods = (config.run.eval_every, config.checkpoint.every, MOST_TOGETHER)
    return min(total - step, *(period - step % period for period in periods))


def train_together(job: Job, batches: Sequence[StepBatch]) -> list[StepMetrics]:
    """Train steps that overlap; return what there is to say of each. Every rank calls.

    Raises TrainingError when the norm of a step's gradient is not finite, as that of a loss that is none; that step has
    changed no weight.
    """
    runner, optimizer, settings = job.runner, job.optimizer, job.config.optimizer
    assert isinstance(runner, RoundPipeRunner)
    assert isinstance(optimizer, Optimizer)
    steps, schedule = [batch.step for batch in batches], job.config.schedule
    rates = [learning_rate(step, schedule, peak=settings.lr, total_steps=job.total_steps) for step in steps]
    norms: list[float] = []

    def before_step(number: int, norm: Tensor) -> None:
        norms.append(float(norm))
        if not norm.isfinite():
            raise TrainingError(
                f"step {steps[number] + 1}: the norm of the gradient is {float(norm)}; the last checkpoint is intact: "
                "resume with a lower optimizer.lr, or look at the samples of that step"
            )
        job.times.fence()
        apply_settings(optimizer, settings, lr=rates[number])

    job.memory.begin()
    where = f"rank {job.world.rank}, steps {steps[0] + 1} to {steps[-1] + 1}"
    with lost_rank_told(where, job.patience_s), job.times.training(steps[0] + 1):
        losses = runner.train_together(batches, optimizer, clip_norm=settings.clip_norm, before_step=before_step)
    job.state.step += len(batches)
    mine = {name: seconds / len(batches) for name, seconds in job.times.take().items()}
    with lost_rank_told(f"{where}, comparing times and memory", job.patience_s):
        ranks = over_ranks({**mine, "peak_bytes": float(job.memory.of_step())}, job.world.device)
    return [
        measured(job.loader.plan(step), loss=float(loss), lr=lr, grad_norm=norm).with_ranks(ranks)
        for step, loss, lr, norm in zip(steps, losses, rates, norms, strict=True)
    ]
