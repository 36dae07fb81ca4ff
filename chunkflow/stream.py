"""Data that comes once and in order, such as a `datasets.IterableDataset`: planned in windows of one global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from chunkflow.agree import batch_digest, require_agreement
from chunkflow.collate import collate
from chunkflow.config import PlannerConfig
from chunkflow.errors import ChunkflowError, PlanError, SourceError, StateError
from chunkflow.index import why_skip
from chunkflow.overflow import apply_overflow, parse_overflow
from chunkflow.plan import plan_step
from chunkflow.prefetch import Prefetcher
from chunkflow.records import StepBatch
from chunkflow.records_raw import item_of, of_table
from chunkflow.sources import Sample, shifted
from chunkflow.sources_memory import MemorySource
from chunkflow.tokenizing import encode, tokenizer_digest
from chunkflow.weighting import check_denominator, check_weighting, denominator_of, weighted
from chunkflow.world import resolve_group, resolve_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STATE = ("tokenizer", "planner", "global_batch", "weighting", "overflow", "field", "step", "records", "digest")


class StreamLoader:
    """Yields one `StepBatch` a step from records in the order they come, for one pass over them.

    `records` is called for each iteration and returns the stream from its beginning: `lambda: dataset`, for an
    `IterableDataset`. Every rank reads the whole stream, and has to get the same. A step takes the next `global_batch`
    samples; records without a target are left out and counted in `skipped`. The other arguments are `ChunkLoader`'s,
    and are compared over the ranks as there. What a stream gives is compared by `ChunkRunner`, step by step.

    A state is the number of records taken and a digest of their tokens. Resuming reads past them again, so any stream
    that repeats itself resumes exactly, at any world size; one that does not is refused with StateError.
    """

    def __init__(
        self,
        records: Callable[[], Iterable[Mapping[str, Any]]],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        chunk_tokens: int,
        global_batch: int,
        rank: int | None = None,
        world_size: int | None = None,
        retain: int = 1,
        pair_cost: float = 1 / 4096,
        prefetch: int = 2,
        overflow: str = "split",
        max_tokens: int | None = None,
        weighting: str = "token",
        field: str = "text",
    ) -> None:
        if global_batch < 1 or prefetch < 1:
            raise PlanError(f"global_batch is {global_batch} and prefetch {prefetch}; both must be at least 1")
        check_weighting(weighting)
        self.config = PlannerConfig(
            chunk_tokens=chunk_tokens, retain=retain, pair_cost=pair_cost, max_tokens=max_tokens
        )
        self._group = None if rank is not None else resolve_group(None)
        self.rank, self.world_size = resolve_place(rank, world_size)
        self.global_batch, self.weighting, self.overflow = global_batch, weighting, parse_overflow(overflow)
        self.skipped: dict[str, int] = {}
        """How many records were left out so far, by reason; those read ahead included."""
        self._records, self._tokenizer, self._field, self._prefetch = records, tokenizer, field, prefetch
        self._digest_of_tokenizer = None if tokenizer is None else tokenizer_digest(tokenizer)
        self._step, self._taken, self._digest = 0, 0, ""
        self._agreed = self._group is None
        self._ahead: Prefetcher[Any] | None = None

    @property
    def step(self) -> int:
        """Steps handed out so far: the number of the next one."""
        return self._step

    def __iter__(self) -> Iterator[StepBatch]:
        self.close()
        self.skipped = {}
        if not self._agreed and self._group is not None:
            require_agreement(self._group, {**self.state_dict(), "prefetch": self._prefetch})
            self._agreed = True
        with Prefetcher(self._steps(self._step, self._taken, self._digest), depth=self._prefetch) as ahead:
            self._ahead = ahead
            for batch, taken, digest in ahead:
                self._step, self._taken, self._digest = batch.step + 1, taken, digest
                yield batch

    def _steps(self, step: int, taken: int, digest: str) -> Iterator[tuple[StepBatch, int, str]]:
        samples = self._samples()
        self._read_past(samples, taken, digest)
        while window := list(islice(samples, self.global_batch)):
            taken = window[-1][0]
            digest = _chained(digest, (sample for _, sample in window))
            yield self._batch(step, [sample for _, sample in window], digest), taken, digest
            step += 1
        if step == 0:
            left_out = "; ".join(f"{count}: {reason}" for reason, count in self.skipped.items())
            raise SourceError(
                f"the stream gave no sample to train on (left out: {left_out or 'nothing, it is empty'}); `records` "
                "must return the stream from its beginning each time it is called"
            )

    def _samples(self) -> Iterator[tuple[int, Sample]]:
        """Yield each sample with the number of records up to and with it."""

        def items() -> Iterator[Any]:
            for number, values in enumerate(self._records()):
                yield item_of(f"record {number}", of_table(values), self._field, self._tokenizer)

        for number, row in enumerate(encode(items(), self._tokenizer), start=1):
            reason = row.skip or why_skip(row)
            if reason is None:
                yield number, shifted(row.input_ids, row.labels)
            else:
                self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _read_past(self, samples: Iterator[tuple[int, Sample]], taken: int, digest: str) -> None:
        number, seen = 0, ""
        while number < taken:
            window = list(islice(samples, self.global_batch))
            if not window:
                break
            number, seen = window[-1][0], _chained(seen, (sample for _, sample in window))
        if (number, seen) != (taken, digest):
            raise StateError(
                f"the stream does not repeat itself: its first {taken} records are not those that were trained (it has "
                f"{number} of them); give the same data in the same order, or start without the state"
            )

    def _batch(self, step: int, samples: list[Sample], digest: str) -> StepBatch:
        limits = {"chunk_tokens": self.config.chunk_tokens, "max_tokens": self.config.max_tokens}
        try:
            source = weighted(apply_overflow(MemorySource(samples), self.overflow, **limits), self.weighting)
            denominator = denominator_of(source.weights, self.weighting, self.global_batch)
            numbers = np.arange(len(source))
            check_denominator(denominator, step, numbers)
            plan = plan_step(
                step, numbers, source.lengths, config=self.config, world_size=self.world_size, denominator=denominator
            )
            chunks = collate(plan.ranks[self.rank], source)
        except ChunkflowError as error:
            raise SourceError(f"step {step} of the stream: {error}") from error
        of_all = batch_digest(plan.digest, digest)
        return StepBatch(step, chunks, denominator, lambda: plan.program, plan.samples, of_all)

    def close(self) -> None:
        """End the thread that reads ahead; the position stays."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON values: behind the last step that was handed out."""
        planner = [self.config.chunk_tokens, self.config.retain, self.config.pair_cost, self.config.max_tokens]
        parts = (self._digest_of_tokenizer, planner, self.global_batch, self.weighting, str(self.overflow), self._field)
        return dict(zip(_STATE, (*parts, self._step, self._taken, self._digest), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another loader stood; its world size may have been another.

        Raises StateError, naming what differs, on a state of other settings; of other data, at the next iteration.
        """
        now = self.state_dict()
        if set(state) != set(now):
            raise StateError(f"the saved state has {sorted(state)}; that of a StreamLoader has {sorted(now)}")
        changed = [key for key in _STATE[:6] if state[key] != now[key]]
        if changed:
            parts = "; ".join(f"{key} was {state[key]!r} and is {now[key]!r}" for key in changed)
            raise StateError(f"the saved state belongs to other steps: {parts}. Go back to the saved values")
        self.close()
        self._step, self._taken, self._digest = state["step"], state["records"], state["digest"]


def _chained(digest: str, samples: Iterable[Sample]) -> str:
    """Return the digest of a window, which stands on that of all windows before it."""
    total = xxhash.xxh3_128(digest.encode())
    for sample in samples:
        for array in (sample.input_ids, sample.shift_labels):
            total.update(array.tobytes())
    return total.hexdigest()
