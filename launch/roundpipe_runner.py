"""`RoundPipeRunner`: the chunks of a job's steps through RoundPipe's slots. Weights live in host memory.

Every rank owns some layers: it steps and saves their parameters, which lie in memory that all ranks share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from chunkflow.engine import WholeParameters
from chunkflow.records import StepBatch
from chunkflow.reduce import sum_gradients
from chunkflow.support import require_exact
from launch.config import FinetuneConfig
from launch.errors import ConfigError
from launch.partial import PartialModel, WholeModel
from launch.roundpipe_plan import plan_slots, step_schedule, steps_schedule
from launch.slot_bytes import kept_bytes
from launch.slot_layers import SlotLayers, dropout_seed
from launch.step_times import StepTimes
from pipeline.config import PipelineConfig
from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import SHARED_MEMORY, exchange_pids, from_first, open_store
from pipeline.roundpipe.layers import first_trained
from pipeline.roundpipe.lowering import scoring
from pipeline.roundpipe.optimizer import BeforeStep, HostOptimizer, global_norm, sum_gradient
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.worker import SlotWorker


class RoundPipeRunner:
    """Trains the chunks of one step on the ranks of `group`, in order; `data_group` trains other data.

    Takes the model over. Every rank of the group makes one: a collective. Raises PlanError on every rank when there is
    no room for the host's copies or the device's memory is too small, and what makes the model unfit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: PipelineConfig,
        *,
        microbatches: int,
        tokens: int,
        group: dist.ProcessGroup | None,
        data_group: dist.ProcessGroup | None,
        rank: int,
        device: torch.device,
        seed: int = 0,
        times: StepTimes | None = None,
    ) -> None:
        self.num_positions = require_exact(model, WholeParameters(None)).num_positions
        self.whole, self._config, self._seed = WholeModel.of(model), config, seed
        self._group, self._data_group, self._microbatches = group, data_group, microbatches
        self._slot_layers = SlotLayers(model, device)
        layers = self._slot_layers.layers
        sizes = model.config.get_text_config()
        room = tokens * sizes.hidden_size * next(model.parameters()).element_size()
        kept: tuple[int, ...] = ()
        if config.device_memory_bytes is not None:  # as measured on the first rank, which has the weights
            first = group is None or dist.get_rank(group) == 0
            measured = kept_bytes(self._slot_layers, tokens=tokens, vocabulary=sizes.vocab_size) if first else ()
            kept = from_first(measured, group)
        self.plan = plan_slots(
            self._slot_layers.pieces, config, microbatches=microbatches, first_trained=first_trained(layers),
            kept_bytes=kept, boundary_bytes=room,
        )  # fmt: skip
        plan = plan_host(
            layers, self.plan.slots, ranks=config.ranks, microbatches=microbatches, boundary_bytes=room,
            staleness=config.staleness,
        )  # fmt: skip
        self.store = open_store(plan, group, folders=(SHARED_MEMORY, Path(tempfile.gettempdir())))
        if rank == 0:
            values = {name: p for layer in reversed(layers) for name, p in layer.parameters.items()}
            self.store.fill(lambda name: values[name].detach())
        peers = Peers(self.store, exchange_pids(group), rank=rank, timeout_s=config.timeout_s)
        self.worker = SlotWorker(
            layers, self.store, peers, device=device, cap_bytes=config.device_memory_bytes,
            trace=times and times.pipeline,
        )  # fmt: skip
        self._times = times
        self._owned = {
            p.name: nn.Parameter(self.store.weights(p.name), requires_grad=p.trained) for p in plan.owned(rank)
        }
        buffers = dict(model.named_buffers()) if rank == 0 else {}
        self.model = PartialModel.of({**buffers, **self._owned}, self._slot_layers.modules, self.whole)

    @property
    def description(self) -> str:
        """Return the slots in words."""
        plan, size = self.plan, self.store.plan.size / 2**20
        return (
            f"pipeline roundpipe of {self._config.ranks} ranks, {plan.rounds} rounds and {plan.open_slots} open slots, "
            f"staleness {self._config.staleness}: forward slots of {_sizes(plan.slots.forward)} layers, "
            f"{plan.slots.fused} fused, backward slots of {_sizes(plan.slots.backward)} (embedding, norm and head are "
            f"layers too); simulated at {plan.over_ideal:.2f} times no idling and no recomputation; {size:,.0f} MiB of "
            f"memory in {self.store.folder}"
        )

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Run one step's forward and backward; return the step's mean loss over all ranks, fp64, 0-d, detached.

        Every rank calls once a step. Afterwards `.grad` of every trained parameter owned here has the gradient of that
        loss added to it. Raises WatchdogError on every rank, in bounded time, when one of them is gone or stopped.
        """
        trained = {name: p for name, p in self._owned.items() if p.requires_grad}
        # Gradients lie in the store, which the run writes anew.
        before = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        for p in trained.values():
            p.grad = None
        loss = self._run(batch, is_scoring=False)
        if batch.chunks:
            for name, p in trained.items():
                p.grad = sum_gradient(self.store, self.store.plan.parameters[name])
        if self._data_group is not None:
            sum_gradients(trained.values(), self._data_group)
        for name, grad in before.items():
            p = trained[name]
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        return loss

    def train_together(
        self,
        batches: Sequence[StepBatch],
        optimizer: Optimizer,
        *,
        clip_norm: float | None,
        before_step: BeforeStep,
    ) -> list[Tensor]:
        """Run some steps that overlap as `staleness` allows, optimizer included; return their mean losses, fp64.

        `optimizer` is of the parameters owned here. `before_step` is called before each of its steps, in a thread, with
        the number of the step among these and the norm of the gradient. Every rank calls. Afterwards the weights are
        those behind the last step. Raises what `before_step` raised, and WatchdogError as `forward_backward`.
        """
        sizes = tuple(map(self._size, batches))
        config = self._config
        schedule = steps_schedule(self.plan, devices=config.ranks, microbatches=sizes, staleness=config.staleness)
        self._slot_layers.begin(batches, seed=self._seed)
        self.worker.optimizer = HostOptimizer(
            self.store, self.worker.peers, lambda _: optimizer, clip_norm=clip_norm, trace=self.worker.trace,
            parameters={name: p for name, p in self._owned.items() if p.requires_grad}, before_step=before_step,
        )  # fmt: skip
        first = batches[0].step
        losses = self.worker.run(schedule, seed=dropout_seed(self._seed, first), first_step=first + 1)
        return [part.sum() for part in losses.split(sizes)]

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Return the step's mean loss over all ranks, fp64, without gradients. Every rank calls."""
        return self._run(batch, is_scoring=True)

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole model's gradient, fp64, the same bits for any number of ranks. Every rank calls.

        Raises WatchdogError in bounded time.
        """
        grads = {name: p.grad for name, p in self._owned.items() if p.grad is not None}
        self.worker.norms += 1
        return global_norm(self.store, self.worker.peers, grads, count=self.worker.norms)

    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the whole model on world rank 0, filled into the one that `build` makes there. Every rank calls."""
        if self._group is not None:
            dist.barrier(self._group)  # all have stepped what they own
        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        model = build()
        with torch.no_grad():
            held = {**{name: self.store.weights(name) for name in self.store.plan.parameters}, **self._buffers()}
            for name, tensor in model.state_dict().items():
                if name in held:
                    tensor.copy_(held[name])
        return model

    def close(self) -> None:
        """End the threads."""
        self.worker.close()

    def _run(self, batch: StepBatch, *, is_scoring: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        if batch.chunks:
            self._slot_layers.begin([batch], seed=self._seed)
            schedule = step_schedule(self.plan, devices=self._config.ranks, microbatches=self._size(batch))
            if is_scoring:
                schedule = scoring(schedule)
            elif self._times is not None:
                self._times.schedule = schedule
            seed = dropout_seed(self._seed, batch.step)
            total = self.worker.run(schedule, seed=seed, scoring=is_scoring, first_step=batch.step + 1).sum()
        if self._data_group is not None:
            dist.all_reduce(total, group=self._data_group)
        return total

    def _size(self, batch: StepBatch) -> int:
        if len(batch.chunks) > self._microbatches:
            raise ConfigError(
                f"step {batch.step + 1} has {len(batch.chunks)} chunks, and there is host memory for "
                f"pipeline.microbatches = {self._microbatches}; raise it, or leave it out for chunks.global_batch"
            )
        return len(batch.chunks)

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers())


def _sizes(slots: tuple[int, ...]) -> str:
    return ", ".join(map(str, slots)) or "none"


def roundpipe_runner(
    model: PreTrainedModel, config: FinetuneConfig, *, rank: int, device: torch.device,
    group: dist.ProcessGroup, data_group: dist.ProcessGroup | None, times: StepTimes | None = None,
) -> RoundPipeRunner:  # fmt: skip
    """Return the runner of a job, whose samples are each within one chunk. Every rank calls, as for the class."""
    chunks = config.chunks
    if config.pipeline.staleness and data_group is not None:
        raise ConfigError(
            f"pipeline.staleness is 1 and pipeline.ranks {config.pipeline.ranks}, with more processes than that: stale "
            "steps are for one pipeline, since ranks that share the data add up their gradients between two steps; use "
            "all processes in one, or staleness 0"
        )
    return RoundPipeRunner(
        model,
        config.pipeline,
        microbatches=config.pipeline.microbatches or chunks.global_batch,
        tokens=chunks.chunk_tokens,
        group=group,
        data_group=data_group,
        rank=rank,
        device=device,
        seed=config.run.seed,
        times=times,
    )
