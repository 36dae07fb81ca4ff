"""One pass of a layer over its chunks: what each lane is given, in the order of the plan, and the loop that computes.

The calling thread computes; the inter- and intra-node lanes move rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moe.dispatch import gather_rows, scatter_sum
from moe.hooks import Hooks
from moe.issue import Result, Span, Ticket
from moe.lanes import Lanes, Later
from moe.plan import COMPUTE, GATHER, LayerPlan
from moe.records import ChunkInfo
from moe.traffic import ChunkTraffic, Ints, Traffic, cuts


class Experts(Protocol):
    """The experts of this rank: any module of such a call, or something like it."""

    @property
    def num_experts(self) -> int:
        """Experts of this rank."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """Return all that backward may have a gradient for."""
        ...

    def __call__(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Return `[N, D]`; rows lie expert by expert, `counts[e]` of expert e."""
        ...


class Pass(NamedTuple):
    """What one pass of a layer moved and took on this rank."""

    layer: str
    backward: bool
    plan: LayerPlan
    traffic: Traffic
    row_bytes: int
    gradient_bytes: int
    """Dense gradients that it hid."""
    seconds: float


@dataclass(frozen=True)
class LayerRun:
    """One pass of one layer: everything but the tensors."""

    experts: Experts
    traffic: Traffic
    plan: LayerPlan
    lanes: Lanes
    hooks: Hooks
    layer: str
    drain: Callable[[str, LayerPlan], int] | None = None
    """Called in backward, between the last dispatch and the first combine: submits dense gradients to `lanes.inter` and
    returns their bytes."""
    on_pass: Callable[[Pass], None] | None = None
    """Told what each pass took."""


Compute = Callable[[Tensor, Any, list[int], Fraction], Tensor]


def run_chunks(rows_RD: Tensor, run: LayerRun, compute: Compute, *, backward: bool) -> Tensor:
    """Move every chunk to its experts, compute its pieces, and move the results back to where the rows came from."""
    began = time.perf_counter()
    every = cuts(run.plan.forward_chunks, run.plan.backward_chunks)
    r = run.plan.chunks(backward=backward)
    chunks = [run.traffic.chunk(Fraction(c, r), Fraction(c + 1, r)) for c in range(r)]
    infos = [ChunkInfo(run.layer, c, r, backward) for c in range(r)]
    flow = _Flow(run, chunks, infos)
    output_RD = None
    try:
        flow.submit(rows_RD)
        # All of it now, while the first rows are on their way: between computations every lane would wait for it.
        pieces = [_pieces(chunk, every, Fraction(c, r), Fraction(c + 1, r)) for c, chunk in enumerate(chunks)]
        for c in range(r):
            rows_N, t0_ns = flow.gathered.pop(c).result(), time.monotonic_ns()
            output_ND = _compute_chunk(run.hooks.after_dispatch(rows_N, infos[c]), pieces[c], compute)
            flow.hand_over(c, run.hooks.before_combine(output_ND, infos[c]), t0_ns)
        for c, chunk in enumerate(chunks):
            part = run.hooks.after_combine(flow.combined.pop(c).result(), infos[c])
            output_RD = _put(rows_RD, output_RD, chunk.send_index, part)
    except BaseException as error:
        flow.give_up(error)
        raise
    assert output_RD is not None
    if run.on_pass is not None:
        row_bytes = rows_RD.shape[-1] * rows_RD.element_size()
        seconds = time.perf_counter() - began
        run.on_pass(Pass(run.layer, backward, run.plan, run.traffic, row_bytes, flow.drained, seconds))
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

    def __init__(self, run: LayerRun, chunks: list[ChunkTraffic], infos: list[ChunkInfo]) -> None:
        self.run, self.chunks, self.infos = run, chunks, infos
        self.way = way = "backward " if infos[0].backward else ""
        self.computed: list[Ticket | None] = [
            run.lanes.ticket(run.layer, f"{way}experts {c}") for c in range(len(chunks))
        ]
        self.gathered: dict[int, Result] = {}
        self.combined: dict[int, Result] = {}
        self.drained = 0

    def submit(self, rows_RD: Tensor) -> None:
        """Give every lane what it has to do."""
        run, chunks, infos, computed = self.run, self.chunks, self.infos, list(self.computed)
        scattered: dict[int, Result] = {}
        # One chunk and no gradients beside it: the calling thread has nothing to do but wait.
        alone = len(chunks) == 1 and (run.drain is None or not infos[0].backward)
        submit = _submitter(run, self.way, alone=alone)
        dispatched = [submit("dispatch", c, self._dispatch(c, rows_RD), None) for c in range(len(chunks))]
        for op in run.plan.intra_order(backward=infos[0].backward):
            sizes, esp = chunks[op.chunk].member_rows, run.lanes.esp
            if op.name == GATHER:
                gather = partial(gather_rows, sizes=sizes, group=esp)
                self.gathered[op.chunk] = submit("gather", op.chunk, gather, dispatched[op.chunk])
            else:
                scatter = partial(scatter_sum, sizes=sizes, group=esp)
                scattered[op.chunk] = submit("scatter", op.chunk, scatter, computed[op.chunk])
        if infos[0].backward and run.drain is not None:
            self.drained = run.drain(run.layer, run.plan)
        for c, chunk in enumerate(chunks):
            self.combined[c] = submit("combine", c, self._combine(chunk), scattered[c])

    def _dispatch(self, c: int, rows_RD: Tensor) -> Callable[[], Tensor]:
        chunk, exchange = self.chunks[c], self.run.lanes.exchange
        sent = self.run.hooks.before_dispatch(take(rows_RD, chunk.send_index), self.infos[c])
        return lambda: exchange(sent, chunk.matrix[self.run.lanes.member])

    def _combine(self, chunk: ChunkTraffic) -> Callable[[Tensor], Tensor]:
        exchange, matrix_PP = self.run.lanes.exchange, chunk.matrix[self.run.lanes.member].T
        return lambda rows: exchange(rows, matrix_PP)

    def hand_over(self, c: int, output: Tensor, t0_ns: int) -> None:
        """Let a chunk's results go on their way; its computation began at `t0_ns`."""
        span = Span(COMPUTE, self.run.layer, f"{self.way}expert {c}", t0_ns, time.monotonic_ns())
        ticket, self.computed[c] = self.computed[c], None  # whoever sums the output frees it
        assert ticket is not None
        ticket.set_result(output)
        if (on_span := self.run.lanes.on_span) is not None:
            on_span(span)

    def give_up(self, error: BaseException) -> None:
        """Fail what waits for computations that will not come, so that no thread sits out its deadline, and the links.

        Peers wait for what will not come; what this rank would exchange next is not that.
        """
        for ticket in self.computed:
            if ticket is not None:
                ticket.set_exception(error)
        for lane in (self.run.lanes.inter, self.run.lanes.intra):
            lane.fail(error, layer=self.run.layer, op=f"{self.way}experts")


def _submitter(
    run: LayerRun, way: str, *, alone: bool
) -> Callable[[str, int, Callable[..., Tensor], Result | None], Result]:
    def submit(op: str, chunk: int, fn: Callable[..., Tensor], needs: Result | None) -> Result:
        lane = run.lanes.intra if op in ("gather", "scatter") else run.lanes.inter
        given = partial(lane.call if alone else lane.submit, fn, needs=needs, layer=run.layer, op=f"{way}{op} {chunk}")
        return Later(given) if alone else given()

    return submit


def take(rows: Tensor, index: Ints) -> Tensor:
    """Return `rows[index]`; without a copy where that is all of them in order, as with one chunk."""
    return rows if _is_all(rows, index) else rows.index_select(0, _on(index, rows))


def _put(like: Tensor, whole: Tensor | None, index: Ints, part: Tensor) -> Tensor:
    """Put `part` at `index` of `whole`, which is made when it is None: of the size of `like`, or `part` itself."""
    if _is_all(like, index):
        return part
    if whole is not None and not len(index):
        return whole  # which may be a part that was expanded, and so cannot be written to
    if whole is None and len(index) == like.shape[0]:  # of which none is twice: the other way round, it is read faster
        return part.index_select(0, _on(np.argsort(index, kind="stable"), part))
    if whole is None:
        whole = torch.empty_like(like, memory_format=torch.contiguous_format)
    return whole.index_copy_(0, _on(index, whole), part)


def _is_all(rows: Tensor, index: Ints) -> bool:
    return len(index) == rows.shape[0] and bool((index[1:] > index[:-1]).all())  # so many different ones that ascend


def _on(index: Ints, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)
