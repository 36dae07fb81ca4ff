"""The op program of one step, executed: a dull loop over (op, chunk).

T tokens of a chunk, D model width

Forward in ascending order; the first chunks of a long group run without a graph, the last `retain` keep theirs.
Backward in descending order; a chunk that kept nothing runs forward again, with its random state, just before.
Source: ChunkFlow, arXiv 2503.02356, with the order of backward that makes the gradients exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from chunkflow.attention.base import ChunkView, Span
from chunkflow.engine import Step
from chunkflow.loss import Tile, tiled_cross_entropy
from chunkflow.parts import Runnable
from chunkflow.records import Chunk, Segment
from chunkflow.rng import replay, rng_state
from chunkflow.sources import NO_TARGET
from chunkflow.state import GroupState


class StepExecutor:
    """Runs one rank's chunks of one step. Call inside `attention_of(model)`; use once.

    `offload` keeps the keys and values of groups in the host's memory.
    """

    def __init__(self, parts: Runnable, chunks: Sequence[Chunk], *, dropout_seed: int, offload: bool = False) -> None:
        self._parts = parts
        self._chunks = chunks
        self._dropout_seed = dropout_seed
        self._device = parts.device
        self._states = {group: GroupState(rows, offload=offload) for group, rows in _capacities(chunks).items()}
        self._hidden: dict[int, Tensor] = {}
        self._dummies: list[Tensor] = []
        self._rng: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._tile = Tile()

    def train(
        self,
        operations: Sequence[Step],
        *,
        denominator: float,
        watch: Callable[[Sequence[Step]], Iterable[Step]] | None = None,
    ) -> Tensor:
        """Run the operations; add d(loss)/d(parameter) to every `.grad`; return this rank's share of the loss, fp64.

        `watch` sees every operation as it is begun and ended: it passes them on one by one.
        """
        total = torch.zeros((), dtype=torch.float64)
        last = max((n for n, (op, _) in enumerate(operations) if op == "B"), default=None)
        for number, (op, position) in enumerate(watch(operations) if watch else operations):
            if op == "B":
                total += self._backward(position, denominator, last=number == last)
            elif position is None:
                self._forward_dummy(op)
            elif op == "f":
                self._forward_without_graph(position)
            else:
                self._forward(position)
        return total

    @torch.no_grad()
    def score(self, operations: Sequence[Step], *, denominator: float) -> Tensor:
        """Forward only, in order; return this rank's share of the loss, fp64."""
        total = torch.zeros((), dtype=torch.float64)
        for _, position in operations:
            chunk = self._chunk(position)
            total += self._loss(chunk, self._run(chunk)).double().cpu() / denominator
            self._release(chunk, last=chunk.count - 1)
        return total

    def _chunk(self, position: int | None) -> Chunk:
        return _DUMMY if position is None else self._chunks[position]

    def _forward_without_graph(self, position: int) -> None:
        self._rng[position] = rng_state(self._device)
        with torch.no_grad():
            self._run(self._chunks[position])

    def _forward(self, position: int) -> None:
        with self._second_time(position):
            self._hidden[position] = self._run(self._chunks[position])

    def _forward_dummy(self, op: str) -> None:
        # The random stream of the chunks goes on as if no dummy had run.
        with torch.set_grad_enabled(op == "F"), replay(rng_state(self._device), self._device):
            hidden = self._run(_DUMMY)
        if op == "F":
            self._dummies.append(hidden)

    def _backward(self, position: int | None, denominator: float, *, last: bool) -> Tensor:
        chunk = self._chunk(position)
        hidden = self._dummies.pop() if position is None else self._hidden.pop(position)
        loss = self._loss(chunk, hidden, denominator) / denominator
        self._parts.engine.backward(loss, last=last)
        self._release(chunk, last=0)
        return loss.detach().double().cpu()

    def _run(self, chunk: Chunk) -> Tensor:
        """Run the model without its head; return hidden states [1, T, D]."""
        tensors = chunk.tensors()
        state = None if chunk.group is None else self._states[chunk.group]
        return self._parts.hidden(
            input_ids=tensors["input_ids"].to(self._device),
            position_ids=tensors["position_ids"].to(self._device),
            chunk_view=ChunkView(_spans(chunk), state, self._dropout_seed),
        )

    def _loss(self, chunk: Chunk, hidden: Tensor, denominator: float | None = None) -> Tensor:
        tensors, head, rule = chunk.tensors(), self._parts.head, self._parts.rule
        known = denominator if self._parts.engine.in_place else None
        labels, weights = tensors["shift_labels"][0].to(self._device), tensors["loss_weights"][0].to(self._device)

        def compute(x: Tensor) -> Tensor:
            inputs = (x[0], head.weight, head.bias, labels, weights, rule)
            return tiled_cross_entropy(*inputs, denominator=known, tile=self._tile)

        return self._parts.at_head(compute, hidden)

    def _second_time(self, position: int) -> AbstractContextManager[None]:
        """Replay the random state of the first forward, if there was one."""
        state = self._rng.pop(position, None)
        return nullcontext() if state is None else replay(state, self._device)

    def _release(self, chunk: Chunk, *, last: int) -> None:
        """Drop the group's state after the chunk with index `last`."""
        if chunk.group is not None and chunk.index == last:
            del self._states[chunk.group]


_DUMMY = Chunk(
    (Segment(-1, 0, 1, 0),),
    None,
    0,
    1,
    {
        "input_ids": torch.zeros(1, 1, dtype=torch.int64),
        "position_ids": torch.zeros(1, 1, dtype=torch.int64),
        "shift_labels": torch.full((1, 1), NO_TARGET),
        "loss_weights": torch.zeros(1, 1),
    },
)
"""One token without a target: what a rank runs where the common program has more operations than it needs."""


def _capacities(chunks: Sequence[Chunk]) -> dict[int, int]:
    """Return for each group the tokens before its last chunk: what its state has to hold."""
    return {c.group: c.prefix for c in chunks if c.group is not None and c.index == c.count - 1}


def _spans(chunk: Chunk) -> tuple[Span, ...]:
    prefixes = [chunk.prefix] + [0] * (len(chunk.segments) - 1)
    return tuple(Span(s.offset, s.length, p, s.sample) for s, p in zip(chunk.segments, prefixes, strict=True))
