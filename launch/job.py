"""A job, put together from its settings: data, model, loader, runner, optimizer and the state to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from chunkflow import ChunkLoader, StepBatch
from chunkflow.engine import WholeParameters
from chunkflow.plan import StepPlan
from chunkflow.sources import Source
from chunkflow.support import require_exact
from launch.bounded import lost_rank_told
from launch.config import FinetuneConfig
from launch.data import Data, check_lengths, check_targets, check_vocabulary, load_data
from launch.env import World, prepare_deepspeed
from launch.experts import ExpertRunner, with_experts
from launch.files import replace_folder
from launch.finite import require_finite, require_finite_evaluation
from launch.gradnorm import clip_
from launch.lora import merge_adapters, with_adapters
from launch.megatron import export_gpt
from launch.memory import PeakMemory, too_large_told
from launch.metrics import StepMetrics
from launch.model import build_model, build_skeleton, vocabulary_size
from launch.optimizer import Stepper, apply_settings, build_optimizer
from launch.partial import WholeModel
from launch.pipeline_job import Place, check_microbatches, check_whole_samples, take_place
from launch.pipeline_parts import held_names
from launch.rng import seed_rngs
from launch.runners import Runner, make_runner
from launch.schedule import learning_rate
from launch.skeleton import deal, share, without_weights
from launch.split import split
from launch.state import TrainState
from launch.step_times import StepTimes, over_ranks
from launch.zero import ZeroRunner

ALONE_TIMEOUT_S = 4 * 3600.0
"""How long ranks wait for what rank 0 does alone, while it gives signs of life: tokenizing, writing, drawing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one rank trains with."""

    config: FinetuneConfig
    world: World
    data: Data
    model: nn.Module
    """What this rank holds of the model."""
    whole: WholeModel
    loader: ChunkLoader
    runner: Runner
    optimizer: Stepper
    state: TrainState
    held_out: tuple[StepBatch, ...]
    """The held-out samples as steps, loaded once."""
    memory: PeakMemory
    times: StepTimes
    pipeline: str | None = None
    """How the model is spread over ranks, in words."""
    experts: ExpertRunner | None = None
    """The runner, where the model's experts are spread."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.config, self.loader)

    @property
    def patience_s(self) -> float:
        """How long a rank waits for another within a step."""
        return self.config.patience_s

    @property
    def _where(self) -> str:
        return f"rank {self.world.rank}, step {self.state.step}"

    def train_step(self, batch: StepBatch) -> StepMetrics:
        """Train one step; return what there is to say of it, but for the time. Every rank calls.

        Raises TrainingError, changing no weight, when the loss or a gradient is not finite.
        """
        settings = self.config.optimizer
        self.memory.begin()
        lr = learning_rate(batch.step, self.config.schedule, peak=settings.lr, total_steps=self.total_steps)
        step = batch.step + 1
        where = f"rank {self.world.rank}, step {step}"
        with lost_rank_told(where, self.patience_s), self.times.training(step):
            loss = float(self.runner.forward_backward(batch))
            norm = self.runner.grad_norm()
        require_finite(step, loss, float(norm))
        with self.times.part("checkpoint"):
            self.times.fence()
        with lost_rank_told(f"{where}, stepping", self.patience_s), self.times.part("update"):
            if settings.clip_norm is not None:  # ZeRO, whose gradients are not the parameters', clips as it steps
                clip_(self.model.parameters(), norm, settings.clip_norm)
            apply_settings(self.optimizer, settings, lr=lr)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        metrics = measured(self.loader.plan(batch.step), loss=loss, lr=lr, grad_norm=float(norm))
        with lost_rank_told(f"{where}, comparing times and memory", self.patience_s):
            mine = {**self.times.take(), "peak_bytes": float(self.memory.of_step())}
            metrics = metrics.with_ranks(over_ranks(mine, self.world.device))
        experts = self.experts
        return metrics if experts is None else metrics.with_experts(experts.loads, experts.notes)

    def evaluate(self) -> float | None:
        """Return the mean loss over all held-out targets; None when nothing is held out. Every rank calls.

        Raises TrainingError when it is no number.
        """
        if not self.held_out:
            return None
        self.model.eval()
        with lost_rank_told(f"{self._where}, evaluating", self.patience_s):
            losses: list[Tensor] = [self.runner.evaluate(batch) * batch.denominator for batch in self.held_out]
        self.model.train()
        mean = math.fsum(map(float, losses)) / math.fsum(batch.denominator for batch in self.held_out)
        return require_finite_evaluation(self.state.step, mean)

    def whole_model(self) -> PreTrainedModel | None:
        """Return the whole model on rank 0, None on the others. Every rank calls."""
        config, tokenizer, device = self.config, self.data.tokenizer, self.world.device
        with lost_rank_told(f"{self._where}, gathering the model", self.patience_s):
            return self.runner.gather(lambda: with_adapters(build_model(config.model, tokenizer, device), config.lora))

    def write_model(self, folder: Path) -> bool:
        """Write the model and its tokenizer as transformers saves them. Every rank calls; return whether this wrote."""
        logging.disable_progress_bar()  # transformers' own, on our way out
        prepare_deepspeed(self.world.device)  # transformers imports it when it saves, engine or not
        if self.experts is not None:
            with lost_rank_told(f"{self._where}, writing the model", self.patience_s):
                self.experts.write(folder, self._write_tokenizer)
            return self.world.rank == 0
        model = self.whole_model()
        write = partial(self._replace, folder, model)
        return self.world.board.together("writing the model", write, timeout_s=ALONE_TIMEOUT_S)

    def _replace(self, folder: Path, model: PreTrainedModel | None) -> bool:
        if model is not None:
            replace_folder(folder, lambda path: self.export(path, model))
        return model is not None

    def export(self, folder: Path, model: PreTrainedModel) -> None:
        """Write the model and its tokenizer."""
        if isinstance(model, PreTrainedModel):
            merge_adapters(model).save_pretrained(folder)
        else:
            export_gpt(model, folder)
        self._write_tokenizer(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        if self.data.tokenizer is not None:
            self.data.tokenizer.save_pretrained(folder)


def num_steps(config: FinetuneConfig, loader: ChunkLoader) -> int:
    """Return the optimizer steps of a whole run."""
    return min(loader.num_steps, config.run.steps or loader.num_steps)


def measured(plan: StepPlan, *, loss: float, lr: float, grad_norm: float) -> StepMetrics:
    """Return a step's metrics, over all ranks: the plan knows the sizes."""
    lengths, stats = plan.lengths.values(), plan.stats()
    return StepMetrics(
        step=plan.step + 1,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens=stats.tokens,
        supervised_tokens=plan.denominator,
        fill=stats.fill,
        split_tokens=sum(length for length in lengths if length > plan.config.chunk_tokens),
        longest=max(lengths),
    )


def prepare(config: FinetuneConfig, world: World) -> Job:
    """Put a job together; what fails on one rank fails on all of them, with its error. Every rank calls.

    Raises WorldError or WatchdogError when a rank does not come in time to share data or weights.
    """
    place = take_place(config, world)
    data = world.board.rank0_first("data", lambda: load_data(config), timeout_s=ALONE_TIMEOUT_S)
    model = world.board.together("model", lambda: build(config, world, data, place))
    with lost_rank_told(f"rank {world.rank}, step 0, sharing the weights", config.patience_s):
        share_model(model, config, place)
    return world.board.together("job", lambda: assemble(config, world, data, model, place))


@too_large_told("the model")
def build(config: FinetuneConfig, world: World, data: Data, place: Place) -> PreTrainedModel:
    """Return the model of a job: with its weights where this rank holds them, else only the shape of it.

    Raises what makes the model unfit, on a rank that holds weights.
    """
    seed_rngs(config.run.seed)  # the same weights on every rank
    if place.holds_weights:
        model = build_model(config.model, data.tokenizer, world.device)
    else:
        model = build_skeleton(config.model, data.tokenizer)
    model = with_adapters(with_experts(model, config.moe, seed=config.run.seed), config.lora)
    check_vocabulary(data.train, vocabulary_size(model))
    if not place.holds_weights:
        without_weights(model, world.device)
    elif place.in_pipeline:  # only here are weights to try it with, and the other ranks have to hear of it
        require_exact(model, WholeParameters(None))
        split(model)
    return model


def share_model(model: PreTrainedModel, config: FinetuneConfig, place: Place) -> None:
    """Give every rank those weights of rank 0 that it trains, or fills the shared memory with. Every rank calls."""
    if place.shares_memory:
        if place.holds_weights:
            share([*model.parameters(), *model.buffers()], place.data_group)
        share(model.buffers(), place.pipeline_group)
    elif place.in_pipeline:
        deal(model, held_names(model, config.pipeline, rank=place.pipeline_rank))
        share(model.buffers())
    else:
        share([*model.parameters(), *model.buffers()])


def assemble(config: FinetuneConfig, world: World, data: Data, model: PreTrainedModel, place: Place) -> Job:
    """Put a job together around its data and its model, which is the same on every rank. Every rank calls."""
    loader = _loader(data.train, config, place, epochs=config.run.epochs)
    sources = [source for source in (data.train, data.held_out) if source is not None]
    check_whole_samples(config, max(int(source.lengths.max()) for source in sources))
    held_out = (
        () if data.held_out is None else tuple(_loader(data.held_out, config, place, epochs=1, report=_say_nothing))
    )
    check_targets(loader, num_steps(config, loader))
    check_microbatches(config, loader, held_out, num_steps(config, loader))
    runner = make_runner(model, config, place)
    for source in sources:
        check_lengths(source, runner.num_positions)
    experts = runner if isinstance(runner, ExpertRunner) else None
    zero = runner if isinstance(runner, ZeroRunner) else None
    optimizer: Stepper
    if zero is None:
        optimizer = plain = build_optimizer(runner.model, config.optimizer, whole=runner.whole)
    else:
        optimizer, plain = zero.optimizer, None
    state = TrainState(
        runner.model, plain, loader, rank=world.rank, world_size=world.world_size, device=world.device,
        seed=config.run.seed, whole=runner.whole, spread=experts, held=None if zero is None else [zero.state],
    )  # fmt: skip
    seed_rngs(config.run.seed + 1 + world.rank)  # but other dropout
    return Job(
        config=config, world=world, data=data, model=runner.model, whole=runner.whole, loader=loader, runner=runner,
        optimizer=optimizer, state=state, held_out=held_out,
        memory=PeakMemory(world.device), times=place.times, pipeline=runner.description, experts=experts,
    )  # fmt: skip


def _say_overflow(accounts: str) -> None:
    print(f"Samples longer than a chunk are split, which cuts nothing (>); other policies would keep:\n{accounts}")


def _say_nothing(accounts: str) -> None:
    """Held-out samples are few, and split like the others."""


def _loader(
    source: Source, config: FinetuneConfig, place: Place, *, epochs: int, report: Callable[[str], None] = _say_overflow
) -> ChunkLoader:
    chunks = config.chunks
    return ChunkLoader(
        source,
        chunk_tokens=chunks.chunk_tokens,
        global_batch=chunks.global_batch,
        rank=place.data_rank,
        world_size=place.data_size,
        retain=chunks.retain,
        pair_cost=chunks.pair_cost,
        seed=config.run.seed,
        epochs=epochs,
        prefetch=chunks.prefetch,
        report=report,
    )
