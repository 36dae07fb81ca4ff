"""One measurement of `benchmarks.chunk_memory`, in a process of its own: JSON in the first argument, JSON out.

The peak is that of the resident set above a warmed base: model, gradients and libraries are there before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chunkflow import SINGLE, ChunkRunner, MemorySource, Sample, StepBatch
from chunkflow.collate import collate
from chunkflow.config import PlannerConfig
from chunkflow.memory import fix_mmap_threshold, peak_resident_bytes, reset_peak, resident_bytes
from chunkflow.plan import plan_step

MMAP_THRESHOLD_BYTES = 64 * 1024
"""Low, so that what is freed is given back and the next peak is not hidden in the base."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What to train, and how."""

    mode: str
    """`chunks`, `full` or `full_checkpointed` (activation checkpointing in every layer)."""
    num_tokens: int
    chunk_tokens: int
    hidden: int = 128
    layers: int = 4
    vocabulary: int = 4096
    retain: int = 1


def model_of(case: Case) -> LlamaForCausalLM:
    """Return a small Llama with two query heads per key/value head of width 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=case.hidden // 64,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def key_value_bytes(case: Case, num_tokens: int) -> int:
    """Return what the keys and values of so many tokens take in fp32, and their fp32 gradients."""
    return num_tokens * 2 * (4 + 4) * (case.hidden // 2) * case.layers


def sequence(case: Case, num_tokens: int) -> Sample:
    """Return random tokens, each but the last with a target."""
    ids = np.random.default_rng(0).integers(0, case.vocabulary, num_tokens)
    weights = np.ones(num_tokens, dtype=np.float32)
    weights[-1] = 0
    return Sample(ids, np.append(ids[1:], -100), weights)


def chunk_step(case: Case, model: LlamaForCausalLM) -> Callable[[int], None]:
    """Return a step over one sequence of n tokens in chunks."""
    runner = ChunkRunner(model, retain=case.retain, group=SINGLE)
    config = PlannerConfig(chunk_tokens=case.chunk_tokens, retain=case.retain)

    def step(num_tokens: int) -> None:
        source = MemorySource([sequence(case, num_tokens)])
        plan = plan_step(0, [0], [num_tokens], config=config, world_size=1, denominator=num_tokens - 1.0)
        chunks = collate(plan.ranks[0], source)
        runner.forward_backward(StepBatch(0, chunks, plan.denominator, plan.program, plan.samples))

    return step


def full_step(case: Case, model: LlamaForCausalLM) -> Callable[[int], None]:
    """Return a step over one whole sequence, through SDPA and transformers' own loss."""
    if case.mode == "full_checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})

    def step(num_tokens: int) -> None:
        ids = torch.from_numpy(sequence(case, num_tokens).input_ids)[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert loss is not None
        loss.backward()

    return step


def measure(case: Case) -> dict[str, Any]:
    """Warm up on one and two chunks, then train one sequence; return the case with peak bytes and seconds."""
    fix_mmap_threshold(MMAP_THRESHOLD_BYTES)
    torch.set_num_threads(1)
    model = model_of(case).train()
    step = chunk_step(case, model) if case.mode == "chunks" else full_step(case, model)
    for _ in range(2):
        step(case.chunk_tokens)
        step(2 * case.chunk_tokens)
    base = resident_bytes()
    reset_peak()
    began = time.perf_counter()
    step(case.num_tokens)
    seconds = time.perf_counter() - began
    return {**asdict(case), "peak_bytes": peak_resident_bytes() - base, "base_bytes": base, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
