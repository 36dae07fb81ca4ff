"""`PipelineRunner`: what `ChunkRunner` is for one process, over the ranks of a pipeline.

Every rank of a pipeline reads the same chunks, plans the same schedule from their sizes, and runs its own row of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow.records import Chunk, StepBatch
from chunkflow.reduce import sum_gradients
from launch.bounded import all_reduce
from launch.gather import gather_weights
from launch.gradnorm import global_grad_norm
from launch.partial import WholeModel
from launch.pipeline_parts import RankParts
from launch.pipeline_plan import plan_order, plan_step, units_of
from launch.step_times import StepTimes
from pipeline.config import PipelineConfig
from pipeline.errors import WatchdogError
from pipeline.runtime import PipelineRuntime
from pipeline.transport import Transport
from pipeline.transport.base import reason_of
from pipeline.trimmed import forward_only


class PipelineRunner:
    """Trains the chunks of one step on the ranks of a pipeline, with the gradients of the one-process run.

    `group` are the ranks of this pipeline, in order; `data_group` those that hold the same layers for other data.
    `pair_cost` is what chunkflow's planner counts for attention; by it the order of the chunks is planned.
    `build_timeout_s` is how long the others wait for rank 0 to build the model that it gathers.
    Made on every rank; does not communicate.
    """

    def __init__(
        self,
        parts: RankParts,
        config: PipelineConfig,
        transport: Transport,
        *,
        retain: int,
        group: dist.ProcessGroup | None,
        data_group: dist.ProcessGroup | None,
        seed: int = 0,
        pair_cost: float = 0.0,
        num_positions: int | None = None,
        times: StepTimes | None = None,
        build_timeout_s: float = 600.0,
    ) -> None:
        self.num_positions = num_positions
        self._parts, self._config, self._retain, self._seed = parts, config, retain, seed
        self._pair_cost, self._build_timeout_s = pair_cost, build_timeout_s
        self._group, self._data_group = group, data_group
        self._runtime = PipelineRuntime(
            parts.stages, transport, rank=parts.rank, timeout_s=config.timeout_s, trace=times and times.pipeline
        )
        self._times = times
        self._parameters = dict(parts.model.named_parameters())
        self._step = 0

    @property
    def model(self) -> nn.Module:
        """What this rank holds, under original names; it cannot be called."""
        return self._parts.model

    @property
    def whole(self) -> WholeModel:
        """The model of which that is a part."""
        return self._parts.whole

    @property
    def description(self) -> str:
        """Return the cut in words."""
        cuts = ", ".join(f"{lo}-{hi - 1}" for lo, hi in self._parts.bounds)
        return (
            f"pipeline {self._config.schedule} of {self._config.ranks} ranks and {self._config.num_stages} stages, "
            f"which hold the layers {cuts} (0 is the embedding, the last two are norm and head)"
        )

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Run one step's forward and backward; return the step's mean loss over all ranks, fp64, 0-d, detached.

        Every rank calls once a step. Afterwards `.grad` of every trained parameter held here has the gradient of that
        loss added to it. Raises WatchdogError on every rank, in bounded time, when one of them is gone or stopped.
        """
        trained = [p for p in self._parameters.values() if p.requires_grad]
        before = [(p, p.grad) for p in trained if p.grad is not None]
        for parameter in trained:
            parameter.grad = None
        loss = self._run(batch, scoring=False)
        self._sum_shared()
        if self._data_group is not None:
            sum_gradients(trained, self._data_group)
        for parameter, grad in before:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return self._over_ranks(loss)

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Return the step's mean loss over all ranks, fp64, without gradients. Every rank calls."""
        with torch.no_grad():
            return self._over_ranks(self._run(batch, scoring=True))

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole model's gradient, each parameter counted once. Every rank calls."""
        mine = [self._parameters[name] for name in self._parts.counted()]
        what = self._where("adding up the gradient's norm")
        return global_grad_norm(mine, group=self._group, timeout_s=self._config.timeout_s, what=what)

    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the whole model on rank 0, filled into the one that `build` makes there. Every rank calls."""
        return gather_weights(
            self._parts, self._group, build, timeout_s=self._config.timeout_s, build_timeout_s=self._build_timeout_s
        )

    def close(self) -> None:
        """End the transport."""
        self._runtime.close()

    def _run(self, batch: StepBatch, *, scoring: bool) -> Tensor:
        """Return this rank's share of the loss, fp64."""
        self._step = batch.step + 1  # errors and traces count as the log does
        total = torch.zeros((), dtype=torch.float64)
        if not batch.chunks:
            return total
        chunks, first_trained, ahead = batch.chunks, self._parts.first_trained, None
        places: Sequence[int] = range(len(chunks))
        if self._config.schedule == "state_aware_1f1b" and not scoring:
            found = plan_order(units_of(chunks, self._retain), ranks=self._config.ranks, pair_cost=self._pair_cost)
            places, ahead = found.places, found.ahead
            chunks = tuple(chunks[place] for place in places)
        schedule = plan_step(
            self._config, units_of(chunks, self._retain), self._parts.bounds, ahead=ahead,
            first_trained=0 if scoring else first_trained,
        )  # fmt: skip
        if scoring:
            schedule = forward_only(schedule)
        elif self._times is not None:
            self._times.schedule = schedule
        self._begin(chunks, batch, scoring)
        losses = self._runtime.run(schedule, step=self._step)
        for mb in sorted(losses, key=lambda mb: places[mb]):  # added up in the order of the batch
            total += losses[mb].double().cpu()
        return total

    def _begin(self, chunks: Sequence[Chunk], batch: StepBatch, scoring: bool) -> None:
        seed = self._seed * 1_000_003 + batch.step
        for layers in self._parts.layers.values():
            layers.begin(chunks, denominator=batch.denominator, dropout_seed=seed, scoring=scoring)

    def _sum_shared(self) -> None:
        """Add up the gradients of weights that several ranks hold: at the first of them, in the order of the ranks."""
        for name in self._parts.shared:
            first, *others = self._parts.holders[name]
            parameter = self._parameters.get(name)
            if parameter is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = parameter.grad
            if self._parts.rank == first:
                for other in others:
                    theirs = torch.empty_like(grad)
                    self._exchange(theirs, name, source=other)
                    grad.add_(theirs)
                for other in others:
                    self._exchange(grad, name, to=other)
            else:
                self._exchange(grad, name, to=first)
                self._exchange(grad, name, source=first)

    def _exchange(self, tensor: Tensor, name: str, *, to: int | None = None, source: int | None = None) -> None:
        assert self._group is not None
        peer = to if source is None else source
        assert peer is not None
        other = dist.get_global_rank(self._group, peer)
        move = dist.isend if source is None else dist.irecv
        try:
            work = move(tensor, other, group=self._group)
            assert work is not None
            work.wait(timedelta(seconds=self._config.timeout_s))
        except RuntimeError as error:
            where = self._where(f"adding up the gradient of {name} with rank {peer}")
            raise WatchdogError(
                f"{where}: rank {peer} is gone, or did nothing for {self._config.timeout_s:g} s: {reason_of(error)}"
            ) from error

    def _over_ranks(self, loss: Tensor) -> Tensor:
        device = next(iter(self._parts.layers.values())).device
        loss = loss.to(device)
        for group in (self._group, self._data_group):
            if group is not None:
                what = self._where("adding up the loss")
                all_reduce(loss, group=group, timeout_s=self._config.timeout_s, what=what)
        return loss.cpu()

    def _where(self, what: str) -> str:
        return f"rank {self._parts.rank}, step {self._step}, {what}"
