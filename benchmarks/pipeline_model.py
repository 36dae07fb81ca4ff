"""What the real ranks of `benchmarks.pipeline` train: a model, one step's micro-batches, and what its layers cost here.

T tokens of a micro-batch, M micro-batches, D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chunkflow import ChunkLoader, MemorySource, StepBatch
from chunkflow.sources import shifted
from launch.layer_costs import LayerCost, measure_layer
from launch.pretrained import SMOLLM2, pretrained_model
from launch.slot_layers import SlotLayers
from pipeline.costs import Costs

WIDTH, INNER, HEADS = 256, 768, 4
SPECIAL_TOKENS = 17
"""The first ids of SmolLM2's vocabulary."""
HOP_S = 3e-4
"""From one rank to the other, with a micro-batch's activation: about what gloo and shared memory take for 1 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One row of the part `real`."""

    name: str
    layers: int
    head: float
    """What forward and backward of the head take, in decoder layers: its vocabulary is made so; 0 for the pretrained
    model, which has its own."""
    tokens: int
    microbatches: int


def shapes(*, quick: bool) -> list[Shape]:
    """Return the rows: heads as heavy as 2 to 10 layers on a body of four, and the real model."""
    tokens, num = (128, 4) if quick else (512, 8)
    made = [Shape(name=f"head {h}", layers=4, head=h, tokens=tokens, microbatches=num) for h in (2, 4, 8, 10)]
    return [*made, Shape(name=SMOLLM2, layers=30, head=0, tokens=64 if quick else 256, microbatches=num)]


def build(shape: Shape, *, vocabulary: int | None = None) -> PreTrainedModel:
    """Return the model, in fp32 and training mode, the same on every rank; its head has `shape.head` layers' weight."""
    if not shape.head:
        return pretrained_model(SMOLLM2).train()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or round(shape.head * (4 * WIDTH + 3 * INNER)),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def head_layers(costs: Costs) -> float:
    """Return what the head takes, in mean decoder layers (embedding and norm are beside them)."""
    seconds = [f + b for f, b in zip(costs.forward_s[0], costs.backward_s[0], strict=True)]
    return seconds[-1] / mean(seconds[1:-2])


def one_step(shape: Shape, vocabulary: int) -> StepBatch:
    """Return a step of M micro-batches, each one sample of T random tokens.

    No special ones: the row of padding has no gradient in transformers and in ours, but has one in the peers' copies.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(SPECIAL_TOKENS, vocabulary, (shape.microbatches, shape.tokens), generator=generator)
    source = MemorySource([shifted(row.numpy(), None) for row in rows])
    with ChunkLoader(
        source, chunk_tokens=shape.tokens, global_batch=shape.microbatches, rank=0, world_size=1, report=lambda _: None
    ) as loader:
        return next(iter(loader))


def measured_costs(layers: SlotLayers, batch: StepBatch, width: int, *, repeats: int) -> Costs:
    """Return what each layer costs on this machine with all ranks at work: the mean of theirs. Every rank calls."""
    layers.begin([batch], seed=0)
    hidden = torch.randn(1, batch.chunks[0].num_tokens, width)
    dist.barrier()
    found = [
        measure_layer(lambda x, run=layer.run: run(x, 0), hidden, module, repeats=repeats)
        for layer, module in zip(layers.layers, layers.modules, strict=True)
    ]
    seconds = torch.tensor([[cost.forward_s, cost.backward_s] for cost in found], dtype=torch.float64)
    dist.all_reduce(seconds)
    return costs_of(found, (seconds / dist.get_world_size()).T.tolist(), hidden.nbytes)


def costs_of(found: Sequence[LayerCost], seconds: Sequence[Sequence[float]], boundary_bytes: int) -> Costs:
    """Return costs with other seconds, forward and backward."""
    return Costs(
        forward_s=(tuple(seconds[0]),),
        backward_s=(tuple(seconds[1]),),
        activation_bytes=(tuple(cost.saved_bytes for cost in found),),
        boundary_bytes=(boundary_bytes,),
        weight_bytes=tuple(cost.weight_bytes for cost in found),
        hop_s=HOP_S,
    )
