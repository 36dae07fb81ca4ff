"""What runs the chunks of a job's steps: one process (or data-parallel ones), or the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow import ChunkRunner, StepBatch
from launch.config import FinetuneConfig
from launch.experts import ExpertRunner
from launch.gradnorm import global_grad_norm
from launch.partial import WholeModel
from launch.pipeline_job import Place, pipeline_runner
from launch.precision import autocast
from launch.shards import gather_shards, shard
from launch.zero import ZeroRunner


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
    """The whole model on every rank, or its shards of FSDP2; ranks share the data."""

    def __init__(self, model: PreTrainedModel, config: FinetuneConfig, place: Place) -> None:
        self.whole, group = WholeModel.of(model), place.data_group
        self._shards: dist.ProcessGroup | None = None
        self.description = None
        if config.engine == "fsdp2":
            model, self._shards = shard(model, place.mesh["dp"]), group
            self.description = f"FSDP2: weights, gradients and moments sharded over {place.data_size} ranks"
        self.model = model
        self._precision = partial(autocast, config.model.precision, next(model.parameters()).device)
        kind = ChunkRunner if config.model.library == "transformers" else _megatron_runner()
        with self._precision():
            self._runner = kind(model, retain=config.chunks.retain, group=group, seed=config.run.seed)
        self._runner.on_operation = place.times.operation
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
        """Return the norm of the gradient, which is whole here, or adds up over the shards."""
        return global_grad_norm(self.model.parameters(), group=self._shards)

    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the model itself, on rank 0, or one made of its shards."""
        if self._shards is not None:
            return gather_shards(self.model, build)
        return self.model if dist.get_rank() == 0 else None


def _megatron_runner() -> Any:
    return import_module("chunkflow.adapters.megatron").MegatronRunner


def make_runner(model: PreTrainedModel, config: FinetuneConfig, place: Place) -> Runner:
    """Return what runs a job's steps. Raises, alike, what makes the model or the settings unfit. Every rank calls:
    ranks of RoundPipe open their shared memory."""
    if config.engine.startswith("zero"):
        return ZeroRunner(model, config, place.data_group, place.times.operation)
    if config.pipeline.schedule == "roundpipe":
        from launch.roundpipe_runner import roundpipe_runner  # with its planner; no other job waits for these

        return roundpipe_runner(
            model,
            config,
            rank=place.pipeline_rank,
            device=place.device,
            group=place.pipeline_group,
            data_group=place.data_group if place.data_size > 1 else None,
            times=place.times,
        )
    if config.moe.wanted:
        return ExpertRunner(model, config, place)
    return WholeRunner(model, config, place) if place.transport is None else pipeline_runner(model, config, place)
