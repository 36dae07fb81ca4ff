"""One pass of a layer over its chunks: what each lane is given, in the order of the plan, and the loop that computes.

The calling thread computes; the inter- and intra-node lanes move rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moe.dispatch import gather_rows, scatter_sum
from moe.hooks import Hooks
from moe.lanes import Lanes, Result
from moe.plan import GATHER, LayerPlan
from moe.records import ChunkInfo
from moe.traffic import ChunkTraffic, Ints, Traffic, cuts


class Experts(Protocol):
    """The experts of this rank: any module of such a call, or something like it."""

    @property
    def num_experts(self) -> int:
        """Experts of this rank."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all that backward may have a gradient for."""
        ...

    def __call__(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Return `[N, D]`; rows lie expert by expert, `counts[e]` of expert e."""
        ...


@dataclass(frozen=True)
class LayerRun:
    """One pass of one layer: everything but the tensors."""

    experts: Experts
    traffic: Traffic
    plan: LayerPlan
    lanes: Lanes
    hooks: Hooks
    layer: str
    drain: Callable[[str, LayerPlan], None] | None = None
    """Called in backward, between the last dispatch and the first combine: submits dense gradients to `lanes.inter`."""


Compute = Callable[[Tensor, Any, list[int], Fraction], Tensor]


def run_chunks(rows_RD: Tensor, run: LayerRun, compute: Compute, *, backward: bool) -> Tensor:
    """Move every chunk to its experts, compute its pieces, and move the results back to where the rows came from."""
    every = cuts(run.plan.forward_chunks, run.plan.backward_chunks)
    r = run.plan.chunks(backward=backward)
    chunks = [run.traffic.chunk(Fraction(c, r), Fraction(c + 1, r)) for c in range(r)]
    infos = [ChunkInfo(run.layer, c, r, backward) for c in range(r)]
    flow = _Flow(run, chunks, infos, rows_RD)
    try:
        # All of it now, while the first rows are on their way: between computations every lane would wait for it.
        pieces = [_pieces(chunk, every, Fraction(c, r), Fraction(c + 1, r)) for c, chunk in enumerate(chunks)]
        for c in range(r):
            rows_ND = run.hooks.after_dispatch(flow.gathered.pop(c).result(), infos[c])
            output_ND = _compute_chunk(rows_ND, pieces[c], compute)
            flow.computed[c].set_result(run.hooks.before_combine(output_ND, infos[c]))
    except BaseException as error:
        flow.give_up(error)
        raise
    output_RD = None
    for c, chunk in enumerate(chunks):
        part = run.hooks.after_combine(flow.combined.pop(c).result(), infos[c])
        output_RD = _put(rows_RD, output_RD, chunk.send_index, part)
    assert output_RD is not None
    # Experts that return what they got, on one rank: the function's output must not be its input in disguise.
    return output_RD.clone() if output_RD.data_ptr() == rows_RD.data_ptr() else output_RD


_Pieces = list[tuple[Fraction, Ints, list[int]]]


def _pieces(chunk: ChunkTraffic, every: list[Fraction], start: Fraction, end: Fraction) -> _Pieces:
    """Return where the pieces of a chunk begin that have rows, which rows these are, and how many each expert has."""
    inside = [cut for cut in every if start <= cut <= end]
    return [(first, *found) for first, last in pairwise(inside) if len((found := chunk.piece_index(first, last))[0])]


def _compute_chunk(rows_ND: Tensor, pieces: _Pieces, compute: Compute) -> Tensor:
    output_ND = None
    for first, index, counts in pieces:
        output_ND = _put(rows_ND, output_ND, index, compute(rows_ND, index, counts, first))
    return rows_ND if output_ND is None else output_ND


class _Flow:
    """Everything one pass submits to the lanes, all of it at once and in the order of the plan."""

    def __init__(self, run: LayerRun, chunks: list[ChunkTraffic], infos: list[ChunkInfo], rows_RD: Tensor) -> None:
        self.run, self.chunks, self.infos = run, chunks, infos
        way = "backward " if infos[0].backward else ""
        self.computed = [run.lanes.ticket(run.layer, f"{way}experts {c}") for c in range(len(chunks))]
        self.gathered: dict[int, Result] = {}
        self.combined: dict[int, Result] = {}
        scattered: dict[int, Result] = {}
        submit = _submitter(run, way)
        dispatched = {c: submit("dispatch", c, self._dispatch(c, rows_RD)) for c in range(len(chunks))}
        for op in run.plan.intra_order(backward=infos[0].backward):
            if op.name == GATHER:
                self.gathered[op.chunk] = submit("gather", op.chunk, self._gather(op.chunk, dispatched))
            else:
                scattered[op.chunk] = submit("scatter", op.chunk, self._scatter(op.chunk))
        if infos[0].backward and run.drain is not None:
            run.drain(run.layer, run.plan)
        for c in range(len(chunks)):
            self.combined[c] = submit("combine", c, self._combine(c, scattered))

    # Each of these returns what a lane's thread will run. They take results out of the dicts, to free the rows.
    def _dispatch(self, c: int, rows_RD: Tensor) -> Callable[[], Tensor]:
        chunk, exchange = self.chunks[c], self.run.lanes.exchange
        sent = self.run.hooks.before_dispatch(take(rows_RD, chunk.send_index), self.infos[c])
        return lambda: exchange(sent, chunk.matrix[self.run.lanes.member])

    def _gather(self, c: int, dispatched: dict[int, Result]) -> Callable[[], Tensor]:
        sizes, esp = self.chunks[c].member_rows, self.run.lanes.esp
        return lambda: gather_rows(dispatched.pop(c).result(), sizes, esp)

    def _scatter(self, c: int) -> Callable[[], Tensor]:
        sizes, esp = self.chunks[c].member_rows, self.run.lanes.esp
        return lambda: scatter_sum(self.computed[c].result(), sizes, esp)

    def _combine(self, c: int, scattered: dict[int, Result]) -> Callable[[], Tensor]:
        matrix_PP, exchange = self.chunks[c].matrix[self.run.lanes.member].T, self.run.lanes.exchange
        return lambda: exchange(scattered.pop(c).result(), matrix_PP)

    def give_up(self, error: BaseException) -> None:
        """Fail what waits for computations that will not come, so that no thread sits out its deadline."""
        for ticket in self.computed:
            if not ticket.done():
                ticket.set_exception(error)


def _submitter(run: LayerRun, way: str) -> Callable[[str, int, Callable[[], Tensor]], Result]:
    def submit(op: str, chunk: int, fn: Callable[[], Tensor]) -> Result:
        lane = run.lanes.intra if op in ("gather", "scatter") else run.lanes.inter
        return lane.submit(fn, layer=run.layer, op=f"{way}{op} {chunk}")

    return submit


def take(rows: Tensor, index: Ints) -> Tensor:
    """Return `rows[index]`; without a copy where that is all of them in order, as with one chunk."""
    return rows if _is_all(rows, index) else rows.index_select(0, _on(index, rows))


def _put(like: Tensor, whole: Tensor | None, index: Ints, part: Tensor) -> Tensor:
    """Put `part` at `index` of `whole`, which is made when it is None: of the size of `like`, or `part` itself."""
    if _is_all(like, index):
        return part
    if whole is None:
        whole = torch.empty_like(like, memory_format=torch.contiguous_format)
    return whole.index_copy_(0, _on(index, whole), part)


def _is_all(rows: Tensor, index: Ints) -> bool:
    return len(index) == len(rows) and bool((np.diff(index, prepend=-1) == 1).all())


def _on(index: Ints, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)
