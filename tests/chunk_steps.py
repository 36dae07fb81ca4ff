"""The same few steps for every engine and trainer: planned for any number of ranks, and the one-process run of them."""

from __future__ import annotations

import torch
from torch import nn

from chunkflow import SINGLE, ChunkRunner, MemorySource, PlannerConfig, StepBatch
from chunkflow.collate import collate
from chunkflow.plan import plan_step
from chunkflow.reference import full_sequence_step
from tests.tiny import sequence, tiny_model

CHUNK_TOKENS, RETAIN = 20, 3
LENGTHS = ([5 * CHUNK_TOKENS + 13, 5, 8, 11, 17, 30], [9, 70, 12], [4])
"""Tokens of the samples of each step: unequal ranks, groups longer than retain, and ranks with nothing."""


def batches(rank: int = 0, world_size: int = 1, *, retain: int = RETAIN) -> list[StepBatch]:
    """Return one rank's batches."""
    config = PlannerConfig(chunk_tokens=CHUNK_TOKENS, retain=retain)
    found = []
    for step, lengths in enumerate(LENGTHS):
        source = source_of(step)
        numbers, denominator = list(range(len(lengths))), float(source.weights.sum())
        plan = plan_step(step, numbers, lengths, config=config, world_size=world_size, denominator=denominator)
        chunks = collate(plan.ranks[rank], source)
        found.append(StepBatch(step, chunks, denominator, plan.program, plan.samples))
    return found


def source_of(step: int) -> MemorySource:
    """Return the samples of a step."""
    return MemorySource([sequence(10 * step + n, length) for n, length in enumerate(LENGTHS[step])])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Plain momentum: unlike Adam it does not hide a wrong scale of the gradient."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train_whole(model: nn.Module, *, inner: nn.Module | None = None) -> list[float]:
    """Train the steps with whole sequences in one process, through SDPA; return the losses."""
    optimizer, losses = optimizer_of(model), []
    for step, batch in enumerate(batches()):
        source = source_of(step)
        samples = {n: source.read(n) for n in range(len(source))}
        losses.append(float(full_sequence_step(inner or model, samples, denominator=batch.denominator)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def one_process(name: str = "llama", **changes: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses and weights after the steps, whole."""
    model = tiny_model(name, **changes)
    return train_whole(model), {n: p.detach().clone() for n, p in model.named_parameters()}


def evaluated(model: nn.Module) -> list[float]:
    """Return the loss of every step's batch, in one process."""
    runner = ChunkRunner(model, group=SINGLE)
    return [float(runner.evaluate(batch)) for batch in batches()]


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two models' weights, relative to each parameter's largest."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n].double() - theirs[n].double()).abs().max() / theirs[n].abs().max()) for n in theirs)
