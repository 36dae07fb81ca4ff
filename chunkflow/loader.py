"""The data side of a job: which samples, planned into chunks, loaded ahead of the step, resumable to the token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from chunkflow import loader_state
from chunkflow.agree import batch_digest, require_agreement
from chunkflow.collate import collate
from chunkflow.config import PlannerConfig
from chunkflow.errors import ChunkflowError, PlanError, SourceError
from chunkflow.loader_state import Balance, flat_identity
from chunkflow.overflow import Kept, Overflow, account, accounting_table, apply_overflow, parse_overflow
from chunkflow.packed import check_packable, packed_step
from chunkflow.plan import StepPlan, plan_step
from chunkflow.plan_input import check_lengths
from chunkflow.prefetch import Prefetcher
from chunkflow.records import StepBatch
from chunkflow.sampler import global_batch, steps_per_epoch
from chunkflow.sources import Source, require_source
from chunkflow.weighting import check_denominator, denominator_of, weighted
from chunkflow.world import resolve_group, resolve_place

T = TypeVar("T")


class ChunkLoader:
    """Yields one `StepBatch` per optimizer step: this rank's chunks of a global batch.

    `source` and every argument but `rank` must be the same on all ranks. A step trains `global_batch` samples over all
    ranks; an epoch's last step is smaller, so that nothing is lost. Which samples a step trains depends on `seed` and
    the step alone, never on `world_size`.

    `rank` and `world_size` default to those of the default process group when `torch.distributed` is initialised, and
    to one process when it is not; only in the former case are the ranks' settings compared before the first step.
    `retain`, `pair_cost` and `max_tokens` are described in `PlannerConfig`, `overflow` (what becomes of sequences that
    are too long) in `chunkflow.overflow`, `weighting` (how much each target counts) in `chunkflow.weighting`.
    `prefetch` steps are planned and loaded ahead by one thread, which `close` ends, as does leaving a `with` or
    dropping the iterator. `report` is given, on rank 0 before the first step, what each overflow policy would keep, cut
    and drop, if any sequence is longer than a chunk.

    A loader has one position. Iterating goes on from it, so `for` after a `break` continues with the next step, and a
    second iterator ends the first. `state_dict` and `load_state_dict` make it torch's `Stateful`; call them between
    steps, from the thread that iterates.

    Raises SourceError when `source` is none. Iterating raises SourceError when data cannot be read or a step has no
    loss weight at all, PlanError when a step cannot be planned.
    """

    def __init__(
        self,
        source: Source,
        *,
        chunk_tokens: int,
        global_batch: int,
        rank: int | None = None,
        world_size: int | None = None,
        retain: int = 1,
        pair_cost: float = 1 / 4096,
        seed: int = 0,
        epochs: int = 1,
        prefetch: int = 2,
        overflow: str = Overflow.SPLIT,
        max_tokens: int | None = None,
        weighting: str = "token",
        report: Callable[[str], None] = print,
    ) -> None:
        self.config = PlannerConfig(
            chunk_tokens=chunk_tokens, retain=retain, pair_cost=pair_cost, max_tokens=max_tokens
        )
        require_source(source)
        check_lengths(np.asarray(source.lengths))
        self.overflow, self.weighting = parse_overflow(overflow), weighting
        self._given = source
        cut = apply_overflow(source, self.overflow, chunk_tokens=chunk_tokens, max_tokens=max_tokens)
        self.source = weighted(cut, weighting)
        self._group = None if rank is not None else resolve_group(None)
        self.rank, self.world_size = resolve_place(rank, world_size)
        self._report = report
        if epochs < 1:
            raise PlanError(f"epochs is {epochs}; it must be at least 1")
        if prefetch < 1:
            raise PlanError(f"prefetch is {prefetch}; it must be at least 1, the step that is made while one trains")
        self.global_batch, self.seed, self.epochs, self.prefetch = global_batch, seed, epochs, prefetch
        self.steps_per_epoch = steps_per_epoch(len(self.source), global_batch)
        self.balance = Balance(((0, pair_cost),))
        self._step = 0
        self._started = False
        self._ahead: Prefetcher[Any] | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all epochs together."""
        return self.steps_per_epoch * self.epochs

    @property
    def step(self) -> int:
        """Steps handed out so far, over all epochs: the number of the next one."""
        return self._step

    def __len__(self) -> int:
        """Optimizer steps in all epochs together, wherever the loader stands."""
        return self.num_steps

    def plan(self, step: int) -> StepPlan:
        """Return the plan of any step, for all ranks, without reading a sample."""
        if not 0 <= step < self.num_steps:
            raise PlanError(f"there is no step {step}; {self.epochs} epochs have steps 0 to {self.num_steps - 1}")
        epoch, place = divmod(step, self.steps_per_epoch)
        samples = global_batch(self.seed, epoch, place, num_samples=len(self.source), global_batch=self.global_batch)
        denominator = denominator_of(self.source.weights[samples], self.weighting, self.global_batch)
        check_denominator(denominator, step, samples)
        return plan_step(
            step,
            samples,
            self.source.lengths[samples],
            config=replace(self.config, pair_cost=self.balance.at(step)),
            world_size=self.world_size,
            denominator=denominator,
        )

    def accounts(self) -> tuple[Kept, ...]:
        """Return how much of the data each overflow policy would keep; reads every sample that one of them cuts."""
        return account(self._given, chunk_tokens=self.config.chunk_tokens, max_tokens=self.config.max_tokens)

    def rebalance(self, pair_cost: float) -> None:
        """Deal chunks to ranks by a new `pair_cost`, from the first step on that no rank can have planned yet.

        Every rank calls at the same step with the same number (`chunkflow.balance.OnlineBalance` does). Steps and their
        chunks stay what they are; only which rank trains which chunk changes.
        """
        self.balance = self.balance.then(self._step + self.prefetch + 2, pair_cost, now=self._step)

    def _start(self) -> None:
        """Before the first step: do the ranks agree, and what becomes of long sequences."""
        if self._started:
            return
        if self._group is not None:
            settings = flat_identity({**self._identity(), "epochs": self.epochs, "prefetch": self.prefetch})
            require_agreement(self._group, settings)
        if self.rank == 0 and int(np.max(self._given.lengths)) > self.config.chunk_tokens:
            self._report(accounting_table(self.accounts(), self.overflow))
        self._started = True

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in self._read_ahead(self._load):
            self._step = batch.step + 1
            yield batch

    def packed(self) -> Iterator[dict[str, Any]]:
        """Yield keyword arguments of a transformers causal LM, one micro-batch at a time, for loops that are not ours.

        Every rank yields the same number in a step; where a rank has fewer chunks, the others are one token without a
        target. `model(**kwargs).loss`, summed over the micro-batches of a step and over all ranks, is the mean loss of
        the step. `step` advances with the last micro-batch of a step, which is the time to step the optimizer; a state
        saved earlier repeats the step.

        Raises PlanError at once when a sample is longer than a chunk, and in iteration on a loss weight that is
        neither 0 nor 1: plain models can do neither.
        """
        check_packable(self.source, self.config.chunk_tokens)
        return self._packed()

    def _packed(self) -> Iterator[dict[str, Any]]:
        for step, micro_batches in self._read_ahead(self._load_packed):
            yield from micro_batches[:-1]
            self._step = step + 1
            yield micro_batches[-1]

    def _load(self, step: int) -> StepBatch:
        plan = self.plan(step)
        chunks = collate(plan.ranks[self.rank], self.source)
        digest = batch_digest(plan.digest, self.source.manifest)
        return StepBatch(step, chunks, plan.denominator, lambda: plan.program, plan.samples, digest)

    def _load_packed(self, step: int) -> tuple[int, list[dict[str, Any]]]:
        plan = self.plan(step)
        count = max(len(chunks) for chunks in plan.ranks)
        chunks = collate(plan.ranks[self.rank], self.source)
        return step, packed_step(step, chunks, count=count, denominator=plan.denominator)

    def _read_ahead(self, load: Callable[[int], T]) -> Iterator[T]:
        """Yield the loaded steps from the loader's position on."""
        self.close()
        self._start()
        with Prefetcher(_each(load, range(self._step, self.num_steps)), depth=self.prefetch) as ahead:
            self._ahead = ahead
            yield from ahead

    def close(self) -> None:
        """End the thread that reads ahead, and the iterator it reads for; the position stays. May be called again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> ChunkLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as JSON values: right behind the last step that was handed out."""
        epoch, place = divmod(self._step, self.steps_per_epoch)
        return {**self._identity(), "balance": self.balance.to_json(), "epoch": epoch, "step": place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another loader stood; its world size may have been another.

        Raises StateError, naming what differs, when the state is of other data, another planner configuration, seed or
        global batch: its steps would not be these.
        """
        step = loader_state.resume_step(state, self._identity(), self.steps_per_epoch, self.num_steps)
        balance = Balance.from_json(state.get("balance", [[0, self.config.pair_cost]]))
        self.close()
        self._step, self.balance = step, balance

    def _identity(self) -> dict[str, Any]:
        return loader_state.identity(
            self.source, self.config, seed=self.seed, global_batch=self.global_batch, weighting=self.weighting
        )


def _each(load: Callable[[int], T], steps: range) -> Iterator[T]:
    for step in steps:
        try:
            loaded = load(step)
        except ChunkflowError:
            raise
        except Exception as error:
            raise SourceError(f"step {step} could not be loaded: {error!r}") from error
        yield loaded
