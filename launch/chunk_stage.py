"""A pipeline stage that runs chunks: some layers of a model, with chunkflow's attention and the state of their groups.

T tokens of a chunk, D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from chunkflow.attention.base import ChunkView, Span
from chunkflow.attention.interface import attention_of
from chunkflow.loss import tiled_cross_entropy
from chunkflow.records import Chunk
from chunkflow.state import GroupState
from launch.split import DecoderArguments, Layer, call_decoder


class ChunkLayers:
    """The layers of one stage. `first_decoder` is the number of its first decoder layer among those of the model.

    `run` takes hidden states [1, T, D] (None on the first stage, which has the embedding) and gives hidden states, or
    the chunk's share of the step's mean loss, 0-d, where the stage has the head.
    """

    def __init__(self, layers: Sequence[Layer], arguments: DecoderArguments, *, first_decoder: int) -> None:
        self._layers, self._arguments, self._first_decoder = layers, arguments, first_decoder
        self._chunks: Sequence[Chunk] = ()
        self._states: dict[int, GroupState] = {}
        self._denominator, self._dropout_seed, self._scoring = 1.0, 0, False
        parameters = [p for layer in layers for p in layer.module.parameters()]
        self.device = parameters[0].device

    def begin(self, chunks: Sequence[Chunk], *, denominator: float, dropout_seed: int, scoring: bool = False) -> None:
        """Take the chunks of a step; with `scoring` there will be no backward."""
        self._chunks, self._denominator, self._dropout_seed = chunks, denominator, dropout_seed
        self._scoring = scoring
        self._states = {c.group: GroupState(c.prefix) for c in chunks if c.group is not None and c.index == c.count - 1}

    def release(self, group: int) -> None:
        """Drop the keys and values of a group."""
        self._states.pop(group, None)

    def run(self, hidden: Tensor | None, mb: int) -> Tensor:
        """Run the layers on chunk `mb`."""
        chunk = self._chunks[mb]
        state = None if chunk.group is None else self._states[chunk.group]
        view = ChunkView(spans_of(chunk), state, self._dropout_seed)
        with attention_of(self._arguments.skeleton):
            out = self._through(hidden, chunk, view)
        if self._scoring and chunk.group is not None and chunk.index == chunk.count - 1:
            self.release(chunk.group)
        return out

    def _through(self, hidden: Tensor | None, chunk: Chunk, view: ChunkView) -> Tensor:
        tensors, decoders = chunk.tensors(), None
        number = self._first_decoder
        for layer in self._layers:
            if layer.kind == "embedding":
                hidden = layer.module(tensors["input_ids"].to(self.device))
                continue
            assert hidden is not None
            if layer.kind == "decoder":
                if decoders is None:
                    positions = tensors["position_ids"].to(self.device)
                    decoders = self._arguments.of(hidden, positions, chunk_view=view)
                hidden = call_decoder(layer.module, hidden, decoders[number])
                number += 1
            elif layer.kind == "norm":
                hidden = layer.module(hidden)
            else:
                hidden = self._loss(layer.module, hidden, tensors)
        assert hidden is not None
        return hidden

    def _loss(self, head: nn.Module, hidden: Tensor, tensors: Any) -> Tensor:
        assert isinstance(head, nn.Linear)
        labels, weights = tensors["shift_labels"][0].to(self.device), tensors["loss_weights"][0].to(self.device)
        return tiled_cross_entropy(hidden[0], head.weight, head.bias, labels, weights) / self._denominator


def spans_of(chunk: Chunk) -> tuple[Span, ...]:
    """Return the segments of a chunk as attention sees them; only the first may have a prefix."""
    prefixes = [chunk.prefix] + [0] * (len(chunk.segments) - 1)
    return tuple(Span(s.offset, s.length, p, s.sample) for s, p in zip(chunk.segments, prefixes, strict=True))
