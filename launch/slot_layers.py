"""A causal LM as layers of RoundPipe: whole samples in chunks, with chunkflow's attention and loss.

T tokens of a chunk, R different ones of them, D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow.attention.base import ChunkView
from chunkflow.attention.interface import attention_of
from chunkflow.loss import tiled_cross_entropy
from chunkflow.records import Chunk, StepBatch
from launch.chunk_stage import spans_of
from launch.split import DecoderArguments, Layer, call_decoder, split
from pipeline.roundpipe.layers import SlotLayer


@dataclass(frozen=True, slots=True)
class StepChunk:
    """A chunk, with what its step has for all of them."""

    chunk: Chunk
    denominator: float
    """Loss weights of the step."""
    dropout_seed: int


class SlotLayers:
    """`layers` run the chunks given to `begin`, micro-batch by micro-batch.

    Takes the model over: its embedding gets a table of its own, of which a micro-batch brings the rows it uses.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._arguments, self.device = DecoderArguments(model), device
        self._chunks: Sequence[StepChunk] = ()
        self._tensors: tuple[int, Any] = (-1, None)
        self._decoders: tuple[int, Sequence[Any]] = (-1, ())
        self.pieces = pieces = split(model)
        self.modules = [piece.module for piece in pieces]
        names = [
            dict(zip(piece.param_names, dict.fromkeys(piece.module.parameters()), strict=True)) for piece in pieces
        ]
        names[0] = {pieces[0].param_names[0]: _own_table(pieces[0].module)}
        self._padding: int | None = getattr(self.modules[0], "padding_idx", None)
        if isinstance(embedding := self.modules[0], nn.Embedding):
            embedding.padding_idx = None  # a number in the whole table; rows are numbered anew, see `_embed`
        self.layers = [self._layer(piece, names[i], i - 1) for i, piece in enumerate(pieces)]

    def begin(self, batches: Sequence[StepBatch], *, seed: int) -> None:
        """Take the chunks of the steps of a run; dropout of attention is drawn from `seed` and the step."""
        self._chunks = [
            StepChunk(chunk, batch.denominator, dropout_seed(seed, batch.step))
            for batch in batches
            for chunk in batch.chunks
        ]
        self._tensors, self._decoders = (-1, None), (-1, ())

    def _layer(self, piece: Layer, parameters: dict[str, nn.Parameter], decoder: int) -> SlotLayer:
        module = piece.module
        if piece.kind == "embedding":
            return SlotLayer(piece.name, parameters, lambda _, mb: self._embed(module, mb), rows=self._rows)
        if piece.kind == "decoder":
            return SlotLayer(piece.name, parameters, lambda x, mb: self._decode(module, x, mb, decoder))
        if piece.kind == "norm":
            return SlotLayer(piece.name, parameters, lambda x, mb: module(x))
        return SlotLayer(piece.name, parameters, lambda x, mb: self._loss(module, x, mb))

    def _of(self, mb: int) -> Any:
        if self._tensors[0] != mb:
            self._tensors = mb, self._chunks[mb].chunk.tensors()
        return self._tensors[1]

    def _rows(self, mb: int) -> Tensor:
        return self._of(mb)["input_ids"].unique()

    def _embed(self, module: nn.Module, mb: int) -> Tensor:
        ids = self._of(mb)["input_ids"]
        hidden = module(torch.searchsorted(self._rows(mb), ids).to(self.device))
        if self._padding is not None:  # its row has no gradient, as in the whole table
            hidden = torch.where((ids == self._padding).to(self.device)[..., None], hidden.detach(), hidden)
        return hidden

    def _decode(self, module: nn.Module, hidden: Tensor | None, mb: int, decoder: int) -> Tensor:
        assert hidden is not None
        with attention_of(self._arguments.skeleton):
            if self._decoders[0] != mb:
                now = self._chunks[mb]
                view = ChunkView(spans_of(now.chunk), None, now.dropout_seed)
                positions = self._of(mb)["position_ids"].to(self.device)
                self._decoders = mb, self._arguments.of(hidden, positions, chunk_view=view)
            return call_decoder(module, hidden, self._decoders[1][decoder])

    def _loss(self, head: nn.Module, hidden: Tensor | None, mb: int) -> Tensor:
        assert isinstance(head, nn.Linear)
        assert hidden is not None
        tensors = self._of(mb)
        labels, weights = tensors["shift_labels"][0].to(self.device), tensors["loss_weights"][0].to(self.device)
        return tiled_cross_entropy(hidden[0], head.weight, head.bias, labels, weights) / self._chunks[mb].denominator


def dropout_seed(seed: int, step: int) -> int:
    """Return the seed of a step's dropout in a job of a seed."""
    return seed * 1_000_003 + step


def _own_table(embedding: nn.Module) -> nn.Parameter:
    """Give an embedding a parameter that is not the head's, with the same values."""
    weight = embedding.weight
    assert isinstance(weight, nn.Parameter)
    table = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    embedding.weight = table
    return table
