"""Is this model trained exactly in chunks? Tried on the model itself, in fp64, against whole sequences."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow.collate import collate
from chunkflow.config import PlannerConfig
from chunkflow.engine import WholeParameters
from chunkflow.parts import parts_of
from chunkflow.plan import plan_step
from chunkflow.records import StepBatch
from chunkflow.reference import float64_throughout, full_sequence_step
from chunkflow.runner import ChunkRunner
from chunkflow.sources import NO_TARGET, Sample
from chunkflow.sources_memory import MemorySource
from chunkflow.world import SINGLE

TOLERANCE = 1e-10
"""Relative, in fp64; rounding alone gives about 1e-15."""
ROUNDING_ONLY = 1e-5
"""A gradient this much smaller than the model's largest is compared on that scale."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One step in chunks against the same step whole; errors are relative to the largest value."""

    num_chunks: int
    retain: int
    loss_error: float
    gradient_error: float
    worst_parameter: str


@dataclass(frozen=True, slots=True)
class ExactReport:
    """What `check_exact` found; prints as a table."""

    model: str
    comparisons: tuple[Comparison, ...]
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether every loss and every parameter's gradient agreed within the tolerance."""
        return all(max(c.loss_error, c.gradient_error) <= self.tolerance for c in self.comparisons)

    def __str__(self) -> str:
        lines = [f"{'chunks':>6} {'retain':>6} {'loss error':>11} {'gradient error':>15}  worst parameter"]
        lines += [
            f"{c.num_chunks:>6} {c.retain:>6} {c.loss_error:>11.1e} {c.gradient_error:>15.1e}  {c.worst_parameter}"
            for c in self.comparisons
        ]
        verdict = "exact" if self.exact else "NOT exact"
        return "\n".join([*lines, f"{self.model}: {verdict} to {self.tolerance:.0e} (fp64, relative)"])


def check_exact(
    model: PreTrainedModel,
    *,
    chunk_tokens: int = 16,
    num_chunks: Sequence[int] = (1, 2, 3, 7),
    tolerance: float = TOLERANCE,
) -> ExactReport:
    """Train steps of random tokens in chunks and whole, compare loss and every gradient; for one process.

    Each step has one sequence of `num_chunks` chunks with a ragged tail and three short ones that are packed, and is
    run with retain 1, 2 and `num_chunks`. Works on two copies of the model in fp64, on its device, in eval mode, so
    without dropout. Raises UnsupportedModelError for a model that is refused at start.
    """
    ours, whole = (_double(model) for _ in "ab")
    comparisons = tuple(
        _compare(ours, whole, count, retain, chunk_tokens)
        for count in num_chunks
        for retain in sorted({1, min(2, count), count})
    )
    return ExactReport(type(model).__name__, comparisons, tolerance)


def _double(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model).double().eval()
    copied.config._experts_implementation = "eager"  # the grouped matrix product has no fp64
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _compare(
    ours: PreTrainedModel, whole: PreTrainedModel, num_chunks: int, retain: int, chunk_tokens: int
) -> Comparison:
    parts = parts_of(ours, WholeParameters(None))
    source = _random_source(num_chunks, chunk_tokens, vocabulary=min(parts.vocabulary, parts.num_targets))
    config = PlannerConfig(chunk_tokens=chunk_tokens, retain=retain)
    numbers, denominator = list(range(len(source))), float(source.weights.sum())
    plan = plan_step(0, numbers, source.lengths.tolist(), config=config, world_size=1, denominator=denominator)
    batch = StepBatch(0, collate(plan.ranks[0], source), denominator, plan.program, plan.samples)
    for model in (ours, whole):
        model.zero_grad(set_to_none=True)
    with float64_throughout():
        loss = ChunkRunner(ours, retain=retain, group=SINGLE).forward_backward(batch)
        samples = {n: source.read(n) for n in numbers}
        expected = full_sequence_step(whole, samples, denominator=denominator, attention="eager")
    errors = dict(_gradient_errors(ours, whole))
    worst = max(errors, key=lambda name: errors[name])
    return Comparison(num_chunks, retain, abs(float(loss / expected) - 1), errors[worst], worst)


def _random_source(num_chunks: int, chunk_tokens: int, *, vocabulary: int) -> MemorySource:
    """Make a sequence of so many chunks with a ragged tail, and three short ones; loss weights uneven, some zero."""
    rng = np.random.default_rng(0)
    lengths = [chunk_tokens * num_chunks - chunk_tokens // 3, chunk_tokens // 4, chunk_tokens // 3, chunk_tokens // 2]
    samples = []
    for length in (max(2, n) for n in lengths):
        ids = rng.integers(0, vocabulary, length)
        weights = rng.random(length, dtype=np.float32)
        weights[1::5], weights[-1] = 0, 0
        samples.append(Sample(ids, np.append(ids[1:], NO_TARGET), weights))
    return MemorySource(samples)


def _gradient_errors(ours: PreTrainedModel, whole: PreTrainedModel) -> Iterator[tuple[str, float]]:
    """Yield each parameter's largest error, relative to its largest gradient.

    A gradient that is zero but for rounding (a key bias under softmax) is measured on the model's scale instead.
    """
    pairs = {
        name: (_gradient(p), _gradient(q))
        for (name, p), (_, q) in zip(ours.named_parameters(), whole.named_parameters(), strict=True)
    }
    floor = ROUNDING_ONLY * max(float(q.abs().max()) for _, q in pairs.values())
    for name, (p, q) in pairs.items():
        yield name, float((p - q).abs().max()) / max(float(q.abs().max()), floor)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
