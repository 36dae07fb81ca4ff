"""Measurements for `chunkflow.tune`, in a process of their own: JSON in the first argument, JSON in the last line out.

Every line before it says how many tokens are trained.

Peaks are of the resident set, or of the accelerator's allocator, above a warmed base: weights and gradients are there.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from chunkflow.collate import collate
from chunkflow.config import PlannerConfig
from chunkflow.engine import WholeParameters
from chunkflow.errors import ChunkflowError
from chunkflow.fit import CostFit
from chunkflow.memory import fix_mmap_threshold, peak_resident_bytes, reset_peak, resident_bytes
from chunkflow.model_open import open_model
from chunkflow.parts import parts_of
from chunkflow.plan import plan_step
from chunkflow.records import Chunk, StepBatch
from chunkflow.runner import ChunkRunner
from chunkflow.sources import shifted
from chunkflow.sources_memory import MemorySource
from chunkflow.tune_process import TRAINED
from chunkflow.world import SINGLE

MMAP_THRESHOLD_BYTES = 64 * 1024
"""Low, so that what is freed is given back and the next peak is not hidden in the base."""


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Train one sequence for each case [chunk_tokens, retain, tokens] of `request`; return peaks, times and sums.

    Sequences are cut to the positions that the model has learned. Raises ChunkflowError when `longest` has more.
    """
    fix_mmap_threshold(MMAP_THRESHOLD_BYTES)
    model = open_model(request["model"], dtype=getattr(torch, request["dtype"]))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = model.to(device).train()  # pyright: ignore[reportArgumentType]
    limit = _most_tokens(model, request["longest"])
    fit, cases = _Followed(), [(size, kept, min(tokens, limit)) for size, kept, tokens in request["cases"]]
    smallest = min(chunk_tokens for chunk_tokens, *_ in cases)
    for tokens in (smallest, 2 * smallest, 2 * smallest):
        _train(model, smallest, 1, min(tokens, limit), None)
    base, rows = _now(device), []
    for chunk_tokens, retain, tokens in cases:
        _reset(device)
        started = time.perf_counter()
        _train(model, chunk_tokens, retain, tokens, fit)
        seconds = time.perf_counter() - started
        row = {"chunk_tokens": chunk_tokens, "retain": retain, "tokens": tokens, "seconds": seconds}
        rows.append({**row, "peak_bytes": _peak(device) - base})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"base_bytes": base, "trained_parameters": trained, "rows": rows, "sums": fit.sums.tolist()}


def _most_tokens(model: PreTrainedModel, longest: int) -> int:
    """Return how long a sequence may be. Raises ChunkflowError when the model has not learned so many positions."""
    positions = ChunkRunner(model, retain=1, group=SINGLE).num_positions
    if positions is not None and longest > positions:
        raise ChunkflowError(f"longest is {longest}, and the model has learned positions for {positions}")
    return sys.maxsize if positions is None else positions


class _Followed(CostFit):
    """Says how many tokens are trained, with each backward."""

    trained = 0

    def add(self, op: str, chunk: Chunk, seconds: float) -> None:
        """See `CostFit.add`."""
        super().add(op, chunk, seconds)
        if op == "B":
            self.trained += chunk.num_tokens
            print(f"{TRAINED}{self.trained}", flush=True)


def _train(model: PreTrainedModel, chunk_tokens: int, retain: int, tokens: int, fit: CostFit | None) -> None:
    runner = ChunkRunner(model, retain=retain, group=SINGLE)
    runner.on_operation = None if fit is None else fit.add
    ids = np.random.default_rng(0).integers(0, parts_of(model, WholeParameters(None)).vocabulary, tokens)
    config = PlannerConfig(chunk_tokens=chunk_tokens, retain=retain)
    plan = plan_step(0, [0], [tokens], config=config, world_size=1, denominator=tokens - 1.0)
    chunks = collate(plan.ranks[0], MemorySource([shifted(ids, None)]))
    runner.forward_backward(StepBatch(0, chunks, plan.denominator, plan.program, plan.samples))


def _now(device: torch.device) -> int:
    return resident_bytes() if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def _reset(device: torch.device) -> None:
    if device.type == "cpu":
        reset_peak()
    else:
        torch.accelerator.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return peak_resident_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
