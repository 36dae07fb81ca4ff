"""The plainest loops over the same model and batches as the job's: DDP by hand, and chunks without the job around them.

B rows, T tokens: all rows are of equal length and fill their chunks, so nothing is split or padded.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from chunkflow import ChunkLoader, ChunkRunner, JsonLines, StepBatch

BETAS, EPS, CLIP_NORM = (0.9, 0.95), 1e-8, 1.0
"""As in the job's settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a loop runs, and on what."""

    rank: int
    world_size: int
    model: Path
    data: Path
    chunk_tokens: int
    row_tokens: int
    global_batch: int
    lr: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a loop that has run."""

    periods: list[float]
    """Seconds from the beginning of a step to that of the next one."""
    losses: list[float]


def loader_of(place: Place) -> ChunkLoader:
    """Return the job's own loader."""
    source = JsonLines(place.data, None, cache_dir=place.data.parent / "tokens")
    return ChunkLoader(
        source, chunk_tokens=place.chunk_tokens, global_batch=place.global_batch, rank=place.rank,
        world_size=place.world_size, seed=0, report=lambda _: None,
    )  # fmt: skip


def model_of(place: Place) -> Any:
    """Return the model, in training mode."""
    return AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).train()


def optimizer_of(model: Any, lr: float) -> torch.optim.AdamW:
    """Return torch's fastest AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


def ddp(place: Place, *, rows: int) -> Seen:
    """Train under DDP, `rows` of a rank's batch in one forward (0: all of them)."""
    batches = [tensors(batch, rows, place.row_tokens) for batch in _all(place)]
    model = model_of(place)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(model, place.lr)

    def step(micro: tuple[Sequence[tuple[Tensor, Tensor]], float]) -> float:
        pieces, targets = micro
        total = torch.zeros(())
        for number, (ids, labels) in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else wrapped.no_sync():
                # DDP divides by the ranks, and each has its part of the step's mean.
                loss = wrapped(
                    input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(targets)
                ).loss
                (loss * place.world_size).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(total)
        return total.item()

    return _timed(step, batches)


def chunks(place: Place) -> Seen:
    """Train by ChunkLoader and ChunkRunner, nothing else around them."""
    model = model_of(place)
    runner, optimizer = ChunkRunner(model), optimizer_of(model, place.lr)

    def step(batch: StepBatch) -> float:
        loss = runner.forward_backward(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    with loader_of(place) as loader:
        return _timed(step, loader)


def tensors(batch: StepBatch, rows: int, row_tokens: int) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Return a rank's rows of a step as (ids, unshifted labels) [B, T] of at most `rows`, and the step's targets."""
    found = [chunk.tensors() for chunk in batch.chunks]
    ids = torch.cat([t["input_ids"] for t in found]).reshape(-1, row_tokens)
    targets = torch.cat([t["shift_labels"] for t in found]).reshape(-1, row_tokens)
    labels = targets.roll(1, 1)  # what is last in a row has no target: -100 comes first
    size = rows or len(ids)
    return list(zip(ids.split(size), labels.split(size), strict=True)), batch.denominator


def _all(place: Place) -> Iterator[StepBatch]:
    with loader_of(place) as loader:
        yield from loader


def _timed(step: Callable[[Any], float], batches: Any) -> Seen:
    gc.collect()
    torch.distributed.barrier()
    began, losses = [], []
    for batch in batches:
        began.append(time.monotonic())
        losses.append(step(batch))
    return Seen(periods_of(began), losses)


def periods_of(began: Sequence[float]) -> list[float]:
    """Return the seconds between steps; the first one, which warms up, is left out."""
    return [after - before for before, after in pairwise(began[1:])]


WAYS: dict[str, Callable[[Place], Seen]] = {
    "DDP, a row at a time": lambda place: ddp(place, rows=1),
    "DDP, all rows at once": lambda place: ddp(place, rows=0),
    "chunks alone": chunks,
}
