"""Proof that an epoch scores every (sample, target) exactly once, across a resume at another world size.

Nothing is taken from the plan: what counts is what stands in the tensors that every rank is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chunkflow.errors import ChunkflowError
from chunkflow.loader import ChunkLoader
from chunkflow.records import StepBatch
from chunkflow.sources import Sample, Source, fetch

MakeLoader = Callable[[int, int], ChunkLoader]
"""Makes the loader of (rank, world_size); all of them of the same source and settings."""
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What was looked at, and everything that was wrong with it."""

    samples: int
    tokens: int
    targets: int
    """Of them: tokens with a target whose loss weight is above 0, as they were given to the ranks."""
    steps: int
    world_size: int
    resumed_at: int
    """Step before which the job was stopped and continued."""
    resumed_world_size: int
    problems: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every target was scored exactly once."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "exact": self.exact}

    def __str__(self) -> str:
        verdict = "every target scored exactly once" if self.exact else "NOT every target was scored exactly once"
        return "\n".join(
            [
                f"{self.steps} steps, {self.samples} samples, {self.tokens} tokens, {self.targets} targets; "
                f"{self.world_size} ranks, from step {self.resumed_at} on {self.resumed_world_size}",
                *self.problems,
                verdict,
            ]
        )


def audit(
    make_loader: MakeLoader,
    *,
    world_size: int,
    resumed_world_size: int,
    resume_at: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Run the first epoch through loaders of every rank, stopped and resumed at another world size.

    `resume_at` is by default the middle of the epoch. `progress` is called with steps done and in all.
    """
    first = [make_loader(rank, world_size) for rank in range(world_size)]
    steps = first[0].steps_per_epoch
    stop = steps // 2 if resume_at is None else resume_at
    if not 0 <= stop <= steps:
        raise ChunkflowError(f"resume_at is {stop}; the epoch has steps 0 to {steps}")
    tally = _Tally(first[0].source)
    _run(first, tally, range(stop), steps, progress)
    state = first[-1].state_dict()
    second = [make_loader(rank, resumed_world_size) for rank in range(resumed_world_size)]
    for loader in second:
        loader.load_state_dict(state)
    _run(second, tally, range(stop, steps), steps, progress)
    tally.finish()
    source = first[0].source
    return AuditReport(
        samples=len(source),
        tokens=int(np.asarray(source.lengths).sum()),
        targets=tally.targets,
        steps=steps,
        world_size=world_size,
        resumed_at=stop,
        resumed_world_size=resumed_world_size,
        problems=tuple(tally.problems[:_MOST_PROBLEMS]),
    )


def _run(
    loaders: list[ChunkLoader], tally: _Tally, steps: range, total: int, progress: Callable[[int, int], None] | None
) -> None:
    iterators = [iter(loader) for loader in loaders]
    for step in steps:
        tally.count(step, [next(iterator) for iterator in iterators])
        if progress:
            progress(step + 1, total)
    for loader in loaders:
        loader.close()


class _Tally:
    """Which samples were trained, and what was wrong with any."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._seen = np.zeros(len(source), dtype=bool)
        self.targets = 0
        self.problems: list[str] = []

    def count(self, step: int, batches: list[StepBatch]) -> None:
        """Take in one step of all ranks."""
        told = {(batch.step, batch.samples, batch.denominator) for batch in batches}
        if len(told) > 1 or batches[0].step != step:
            self.problems.append(f"step {step}: the ranks do not agree on step, samples and denominator")
        samples = {index: fetch(self._source, index) for index in batches[0].samples}
        times = {index: np.zeros(len(sample.input_ids), dtype=np.int64) for index, sample in samples.items()}
        for index in samples:
            if self._seen[index]:
                self.problems.append(f"step {step}: sample {index} was trained before")
            self._seen[index] = True
        for rank, batch in enumerate(batches):
            self._count_rank(f"step {step}, rank {rank}", batch, samples, times)
        for index, counted in times.items():
            if (counted != 1).any():
                at = int((counted != 1).argmax())
                self.problems.append(f"step {step}: token {at} of sample {index} was scored {counted[at]} times")

    def _count_rank(
        self, where: str, batch: StepBatch, samples: dict[int, Sample], times: dict[int, np.ndarray]
    ) -> None:
        for chunk in batch.chunks:
            tensors = {name: tensor.numpy().reshape(-1) for name, tensor in chunk.tensors().items()}
            for segment in chunk.segments:
                if segment.sample not in samples:
                    self.problems.append(f"{where}: sample {segment.sample} is not of this step")
                    continue
                here = slice(segment.offset, segment.offset + segment.length)
                there = slice(segment.start, segment.start + segment.length)
                times[segment.sample][there] += 1
                self.targets += int(np.count_nonzero(tensors["loss_weights"][here]))
                sample = samples[segment.sample]
                for name in ("input_ids", "shift_labels", "loss_weights"):
                    if not np.array_equal(tensors[name][here], getattr(sample, name)[there]):
                        self.problems.append(f"{where}: {name} of sample {segment.sample} are not the data's")

    def finish(self) -> None:
        """Take in that the epoch is over."""
        missing = np.flatnonzero(~self._seen)
        if len(missing):
            self.problems.append(f"{len(missing)} samples were never trained, the first of them {missing[0]}")
