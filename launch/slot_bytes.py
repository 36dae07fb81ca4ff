"""What a chunk keeps on a device of RoundPipe, layer by layer, counted as the device's own memory counts it."""

from __future__ import annotations

import numpy as np
import torch

from chunkflow.collate import collate
from chunkflow.records import Chunk, Segment, StepBatch
from chunkflow.sources import shifted
from chunkflow.sources_memory import MemorySource
from launch.slot_layers import SlotLayers
from pipeline.random_state import RandomState
from pipeline.roundpipe.arena import Arena
from pipeline.roundpipe.layers import SlotLayer


def kept_bytes(layers: SlotLayers, *, tokens: int, vocabulary: int) -> tuple[int, ...]:
    """Return what each layer keeps of a chunk of `tokens` between forward and backward, at most, its input included.

    Of an embedding that is the rows it reads, too. The weights have to be there. No chunk of as many tokens keeps more:
    in this one they differ where they can, and each has a target. Takes one forward pass, layer by layer.
    """
    random = RandomState.now(layers.device)
    layers.begin([_fullest(tokens, vocabulary)], seed=0)
    found, x = [], None
    try:
        for layer in layers.layers:
            out, nbytes = _run(layer, x)
            found.append(nbytes)
            x = out.detach().requires_grad_()
    finally:
        layers.begin((), seed=0)
        random.set(layers.device)
    return tuple(found)


def _run(layer: SlotLayer, x: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    parameters = layer.parameters.values()
    there = [*parameters, *([] if x is None else [x])]
    arena, known = Arena(device=0), {tensor.untyped_storage().data_ptr() for tensor in there}
    with torch.enable_grad(), arena.graph(0, known, []):
        out = layer.run(x, 0)
    nbytes = arena.used_bytes + (0 if x is None else x.nbytes)
    if layer.rows is not None:
        nbytes += sum(p[layer.rows(0)].nbytes for p in parameters)
    return out, nbytes


def _fullest(tokens: int, vocabulary: int) -> StepBatch:
    """Return a step of one chunk, of one sample."""
    tokens = max(tokens, 2)  # a sample has no less
    source = MemorySource([shifted(np.arange(tokens) % vocabulary, None)])
    chunks = collate([Chunk((Segment(0, 0, tokens, 0),))], source)
    return StepBatch(step=0, chunks=chunks, denominator=float(tokens), program="FB")
