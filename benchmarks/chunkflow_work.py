"""What `benchmarks.chunkflow` trains: lengths, tokens, the model, and the same work as every way divides it.

T tokens of a row, B rows of a batch, V vocabulary
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from chunkflow.lengths import lmsys
from chunkflow.sources import Sample, shifted

Lengths = NDArray[np.int64]

CAP_BYTES = 1500 * 10**6
"""Of every way, a rank, above model, gradients and data: the longest sequence exceeds it without recompute."""

_NOT_SOURCES = {"site-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with heads 64 wide, two query heads for each key/value head."""

    hidden: int
    layers: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class DataSet:
    """Lengths of one global batch, divided so that a run takes minutes and the longest is 16K to 32K tokens."""

    name: str
    source: str
    """What was divided by `factor`, for people."""
    factor: float
    lengths: Lengths
    """int64 [samples], in the order they are drawn."""


def stdlib_bytes() -> Lengths:
    """Return the sizes of the sources of Python's standard library, in order of their paths, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not _NOT_SOURCES & set(p.relative_to(root).parts))
    sizes = np.array([p.stat().st_size for p in paths], dtype=np.int64)
    return sizes[sizes > 0]


def data_set(name: str, *, quick: bool) -> DataSet:
    """Return `lmsys` or `stdlib`; with `quick` a small part, the longest about 2K."""
    if name == "lmsys":
        num, factor = (256, 60.0) if quick else (2048, 7.0)
        drawn, source = lmsys(4096, seed=2), "4096 of the synthetic lengths `lmsys`, in tokens"
    else:
        drawn, source = stdlib_bytes(), "sizes of the standard library's sources, in bytes"
        num, longest = (128, 2048) if quick else (len(drawn), 16_384)
        factor = float(drawn.max() // longest)
    order = np.random.default_rng(0).permutation(len(drawn))
    kept = order[: min(num, len(drawn))]
    kept[0] = int(np.argmax(drawn)) if drawn[kept].max() < drawn.max() else kept[0]
    source += f", {num} of them with the longest" if num < len(drawn) else ""
    return DataSet(name, source, factor, np.maximum(2, np.ceil(drawn[kept] / factor)).astype(np.int64))


def samples_of(lengths: Sequence[int] | Lengths, shape: Shape) -> list[Sample]:
    """Return random tokens of these lengths, each but the last of a sequence with a target."""
    random = np.random.default_rng(0)
    return [shifted(random.integers(0, shape.vocabulary, int(n)), None) for n in lengths]


def model_of(shape: Shape, *, recompute: bool, compiled: bool = False) -> LlamaForCausalLM:
    """Return the model, equal weights each time; `recompute` is activation checkpointing in every layer.

    `compiled` layers take rows of any size: what is compiled for one is compiled for all.
    """
    torch.manual_seed(0)
    heads = shape.hidden // 64
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=2**17,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=True)
    return model


@dataclass(frozen=True, slots=True)
class Load:
    """The operations of one rank that a model of the hardware counts."""

    forward_tokens: float = 0
    """Through the layers, recompute and padding included."""
    backward_tokens: float = 0
    head_tokens: float = 0
    """Through the output projection, forward and backward."""
    forward_pairs: float = 0
    """(query, key) of one layer and head that are computed, recompute, padding and masked ones included."""
    backward_pairs: float = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.forward_tokens + other.forward_tokens,
            self.backward_tokens + other.backward_tokens,
            self.head_tokens + other.head_tokens,
            self.forward_pairs + other.forward_pairs,
            self.backward_pairs + other.backward_pairs,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """One rank's part of a step, ready to run: nothing but forward, backward and the reduction is left."""

    run: Callable[[], float]
    """Add up gradients over the ranks; return the step's loss."""
    load: Load
    tokens: int
    """Trained by this rank, padding not counted."""


def causal(length: float) -> float:
    """Pairs of one sequence that sees itself backwards."""
    return length * (length + 1) / 2
