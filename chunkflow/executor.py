"""The op program of one step, executed: a dull loop over (op, chunk).

T tokens of a chunk, D model width

Forward in ascending order; the first chunks of a long group run without a graph, the last `retain` keep theirs.
Backward in descending order; a chunk that kept nothing runs forward again, with its random state, just before.
Source: ChunkFlow, arXiv 2503.02356, with the order of backward that makes the gradients exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from chunkflow.attention.base import ChunkView, Span
from chunkflow.loss import tiled_cross_entropy
from chunkflow.parts import CausalParts
from chunkflow.records import Chunk
from chunkflow.rng import replay, rng_state
from chunkflow.state import GroupState


class StepExecutor:
    """Runs one rank's chunks of one step. Call inside `attention_of(model)`; use once."""

    def __init__(self, parts: CausalParts, chunks: Sequence[Chunk], *, dropout_seed: int) -> None:
        self._parts = parts
        self._chunks = chunks
        self._dropout_seed = dropout_seed
        self._device = parts.head.weight.device
        self._states = {group: GroupState(capacity) for group, capacity in _capacities(chunks).items()}
        self._hidden: dict[int, Tensor] = {}
        self._rng: dict[int, tuple[Tensor, Tensor | None]] = {}

    def train(self, operations: Iterable[tuple[str, int]], *, denominator: float) -> Tensor:
        """Run the operations; add d(loss)/d(parameter) to every `.grad`; return this rank's share of the loss, fp64."""
        handlers = {"f": self._forward_without_graph, "F": self._forward}
        total = torch.zeros((), dtype=torch.float64)
        for op, position in operations:
            if op == "B":
                total += self._backward(position, denominator)
            else:
                handlers[op](position)
        return total

    @torch.no_grad()
    def score(self, *, denominator: float) -> Tensor:
        """Forward only, in order; return this rank's share of the loss, fp64."""
        total = torch.zeros((), dtype=torch.float64)
        for position in range(len(self._chunks)):
            total += self._loss(position, self._run(position)).double().cpu() / denominator
            self._release(position, last=self._chunks[position].count - 1)
        return total

    def _forward_without_graph(self, position: int) -> None:
        self._rng[position] = rng_state(self._device)
        with torch.no_grad():
            self._run(position)

    def _forward(self, position: int) -> None:
        with self._second_time(position):
            self._hidden[position] = self._run(position)

    def _backward(self, position: int, denominator: float) -> Tensor:
        loss = self._loss(position, self._hidden.pop(position)) / denominator
        loss.backward()
        self._release(position, last=0)
        return loss.detach().double().cpu()

    def _run(self, position: int) -> Tensor:
        """Run the model without its head; return hidden states [T, D]."""
        chunk = self._chunks[position]
        tensors = chunk.tensors()
        state = None if chunk.group is None else self._states[chunk.group]
        view = ChunkView(_spans(chunk), state, self._dropout_seed)
        output = self._parts.base(
            input_ids=tensors["input_ids"].to(self._device),
            position_ids=tensors["position_ids"].to(self._device),
            use_cache=False,
            chunk_view=view,
        )
        return output.last_hidden_state[0]

    def _loss(self, position: int, hidden: Tensor) -> Tensor:
        tensors = self._chunks[position].tensors()
        labels, weights = tensors["shift_labels"][0], tensors["loss_weights"][0]
        head = self._parts.head
        return tiled_cross_entropy(hidden, head.weight, head.bias, labels.to(self._device), weights.to(self._device))

    def _second_time(self, position: int) -> AbstractContextManager[None]:
        """Replay the random state of the first forward, if there was one."""
        state = self._rng.pop(position, None)
        return nullcontext() if state is None else replay(state, self._device)

    def _release(self, position: int, *, last: int) -> None:
        """Drop the group's state after the chunk with index `last`."""
        chunk = self._chunks[position]
        if chunk.group is not None and chunk.index == last:
            del self._states[chunk.group]


def _capacities(chunks: Sequence[Chunk]) -> dict[int, int]:
    """Return for each group the tokens before its last chunk: what its state has to hold."""
    return {c.group: c.prefix for c in chunks if c.group is not None and c.index == c.count - 1}


def _spans(chunk: Chunk) -> tuple[Span, ...]:
    prefixes = [chunk.prefix] + [0] * (len(chunk.segments) - 1)
    return tuple(Span(s.offset, s.length, p, s.sample) for s, p in zip(chunk.segments, prefixes, strict=True))
