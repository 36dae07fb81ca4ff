"""What runs the chunks of a job's steps: one process (or data-parallel ones), or the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow import ChunkRunner, StepBatch
from launch.config import FinetuneConfig
from launch.errors import ConfigError
from launch.experts import ExpertRunner
from launch.gradnorm import global_grad_norm
from launch.partial import WholeModel
from launch.pipeline_job import Place, pipeline_runner
from launch.precision import autocast
from launch.roundpipe_runner import roundpipe_runner


class Runner(Protocol):
    """What a job needs of whatever runs its steps. Every method is called on every rank."""

    @property
    def model(self) -> nn.Module:
        """What this rank holds of the model, by original names."""
        ...

    @property
    def whole(self) -> WholeModel:
        """The model of which that is a part."""
        ...

    @property
    def num_positions(self) -> int | None:
        """Tokens the longest sequence may have; None for no limit."""
        ...

    @property
    def description(self) -> str | None:
        """How the model is spread over ranks, in words."""
        ...

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Add the gradient of the step's mean loss to `.grad`; return that loss."""
        ...

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Return the step's mean loss."""
        ...

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole model's gradient."""
        ...

    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the whole model on rank 0; `build` makes one to be filled where none is there."""
        ...


class WholeRunner:
    """The whole model on every rank; ranks share the data."""

    def __init__(self, model: PreTrainedModel, config: FinetuneConfig, group: dist.ProcessGroup) -> None:
        self.model = model
        self.whole = WholeModel.of(model)
        self.description = None
        self._precision = partial(autocast, config.model.precision, model.device)
        with self._precision():
            self._runner = ChunkRunner(model, retain=config.chunks.retain, group=group, seed=config.run.seed)
        self.num_positions = self._runner.num_positions

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """See `Runner.forward_backward`."""
        with self._precision():
            return self._runner.forward_backward(batch)

    def evaluate(self, batch: StepBatch) -> Tensor:
        """See `Runner.evaluate`."""
        with self._precision():
            return self._runner.evaluate(batch)

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradient, which is whole here."""
        return global_grad_norm(self.model.parameters())

    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the model itself, on rank 0."""
        return self.model if dist.get_rank() == 0 else None


def make_runner(model: PreTrainedModel, config: FinetuneConfig, place: Place) -> Runner:
    """Return what runs a job's steps. Raises, alike, what makes the model or the settings unfit. Every rank calls:
    ranks of RoundPipe open their shared memory."""
    round_robin = config.pipeline.schedule == "roundpipe"
    if place.transport is None and not config.moe.wanted and not round_robin:
        return WholeRunner(model, config, place.data_group)
    if config.moe.wanted and not round_robin:
        return ExpertRunner(model, config, place)
    if config.model.precision != "fp32":
        raise ConfigError(
            f"model.precision is {config.model.precision}, and pipelines and RoundPipe compute in fp32; set it to fp32"
        )
    if round_robin:
        return roundpipe_runner(
            model,
            config,
            rank=place.pipeline_rank,
            device=place.device,
            group=place.pipeline_group,
            data_group=place.data_group if place.data_size > 1 else None,
        )
    return pipeline_runner(model, config, place)
