"""One rank of launch.finetune itself, watched from outside: when things began, peak memory, and its plan's load.

torchrun ... -m benchmarks.job_ours FOLDER [SETTINGS OF launch.finetune]        (started by benchmarks.job)
"""

from __future__ import annotations

import time

_IMPORTING = time.monotonic()

import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.chunkflow_work import Load  # noqa: E402
from benchmarks.job_runs import born, tell  # noqa: E402
from chunkflow import StepBatch  # noqa: E402
from chunkflow.cost import num_pairs  # noqa: E402
from chunkflow.memory import peak_resident_bytes  # noqa: E402
from chunkflow.plan import StepPlan  # noqa: E402
from chunkflow.program import operations  # noqa: E402
from chunkflow.records import Chunk  # noqa: E402
from chunkflow.sources import NO_TARGET, Source  # noqa: E402
from launch import finetune  # noqa: E402
from launch.env import read_processes  # noqa: E402
from launch.job import Job  # noqa: E402
from launch.metrics import StepMetrics, read_metrics  # noqa: E402


@dataclass
class Probe:
    """What is seen of a job. Moments are on the monotonic clock."""

    steps: list[float] = field(default_factory=list)
    """When each call of `train_step` began."""
    losses: list[float] = field(default_factory=list)
    evaluating_s: float = 0.0
    """Before the first step."""
    assembled: float = 0.0
    """When the job was put together: data, model, checkpoints looked at."""
    ended: float = 0.0
    """When all steps were trained and the last checkpoint was durable."""
    peak_bytes: int = 0
    loads: list[Load] = field(default_factory=list)
    """Of this rank, by step."""
    prepared: list[tuple[float, float]] = field(default_factory=list)
    """When `prepare` began and ended."""

    def train_step(self, job: Job, batch: StepBatch) -> StepMetrics:
        """Train a step, and note when it began."""
        self.steps.append(time.monotonic())
        metrics = _train_step(job, batch)
        self.losses.append(metrics.loss or 0.0)
        return metrics

    def evaluate(self, job: Job) -> float | None:
        """Evaluate, and note the time it takes before the first step."""
        began = time.monotonic()
        loss = _evaluate(job)
        self.evaluating_s += 0.0 if self.steps else time.monotonic() - began
        return loss

    def prepare(self, *arguments: Any) -> Job:
        """Put a job together, and note when."""
        began = time.monotonic()
        job = _prepare(*arguments)
        self.prepared.append((began, time.monotonic()))
        return job

    def train(self, job: Job, *arguments: Any) -> bool:
        """Train to the end."""
        self.assembled = time.monotonic()
        stopped = _train(job, *arguments)
        self.ended = time.monotonic()
        self.peak_bytes = peak_resident_bytes()  # since the last step began
        plans = [job.loader.plan(step) for step in range(job.total_steps)]
        self.loads = [load_of(plan, job.world.rank, job.data.train) for plan in plans]
        return stopped

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the job that runs in this process meanwhile."""
        job: Any = Job
        job.train_step, job.evaluate = (lambda me, b: self.train_step(me, b)), (lambda me: self.evaluate(me))
        finetune.train, finetune.prepare = self.train, self.prepare
        try:
            yield
        finally:
            job.train_step, job.evaluate = _train_step, _evaluate
            finetune.train, finetune.prepare = _train, _prepare

    def report(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


_train_step, _evaluate = Job.train_step, Job.evaluate
_train, _prepare = finetune.train, finetune.prepare


def load_of(plan: StepPlan, rank: int, source: Source) -> Load:
    """Return the operations of one rank's chunks; the output projection is of scored tokens only."""
    load, chunks = Load(), plan.ranks[rank]
    for op, position in operations(chunks, plan.config.retain):
        chunk = chunks[position]
        tokens, pairs = chunk.num_tokens, num_pairs(chunk)
        load += (
            Load(backward_tokens=tokens, backward_pairs=pairs, head_tokens=scored_tokens(chunk, source))
            if op == "B"
            else Load(forward_tokens=tokens, forward_pairs=pairs)
        )
    return load


def scored_tokens(chunk: Chunk, source: Source) -> int:
    """Return the targets of one chunk."""
    labels = [source.read(s.sample).shift_labels[s.start : s.start + s.length] for s in chunk.segments]
    return sum(int((part != NO_TARGET).sum()) for part in labels)


def main() -> int:
    """Run launch.finetune with the settings; tell what was seen."""
    folder, settings = sys.argv[1], sys.argv[2:]
    rank, probe, imported = read_processes().rank, Probe(), time.monotonic()
    with probe.watching():
        code = finetune.main(settings)
    if code == 0:
        run = Path(settings[settings.index("--run.folder") + 1])
        lines = read_metrics(run / "metrics.jsonl")
        tell(folder, rank, {**probe.report(), "born": born(), "importing": _IMPORTING, "imported": imported,
                            "metrics": lines if rank == 0 else []})  # fmt: skip
    return code


if __name__ == "__main__":
    sys.exit(main())
