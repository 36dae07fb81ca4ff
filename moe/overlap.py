"""Dispatch, experts and combine as one autograd function that runs in chunks on three lanes.

Forward is cut at the borders of both directions and keeps one graph for each piece, so any expert module works, nothing
is computed twice, and backward may have another number of chunks. The weighted sum over a token's experts is outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from moe.errors import ContractError, MoeError
from moe.flow import LayerRun, run_chunks, take
from moe.traffic import Ints


@dataclass(frozen=True)
class Piece:
    """The graph of the experts over the rows between two cuts; holds no rows itself."""

    rows: GradientEdge
    output: GradientEdge


def run_experts(rows_RD: Tensor, run: LayerRun) -> Tensor:
    """Return the experts' output for this rank's rows, `[R, D]`, which lie expert by expert. Every rank calls.

    Raises ExchangeError naming rank, layer and operation when a rank is lost or late.
    """
    params = [p for p in run.experts.parameters() if p.requires_grad]
    keep = torch.is_grad_enabled() and (rows_RD.requires_grad or bool(params))
    return _Overlap.apply(rows_RD, run, keep, *params)  # pyright: ignore[reportReturnType]


class _Overlap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, run: LayerRun, keep: bool, *params: Tensor) -> Tensor:
        pieces: dict[Fraction, Piece | None] = {}
        saved = _Saved()

        def compute(rows_ND: Tensor, index: Ints, counts: list[int], start: Fraction) -> Tensor:
            if not sum(counts):
                return rows_ND
            with torch.set_grad_enabled(keep), saved.collect():
                output_ND, pieces[start] = _with_graph(run, take(rows_ND, index), counts, keep)
            return output_ND.detach()

        output_RD = run_chunks(rows_RD, run, compute, backward=False)
        ctx.run, ctx.params = run, params
        ctx.pieces, ctx.saved = pieces, saved
        saved.find_changed()
        # Never empty: under non-reentrant activation checkpointing, reading it recomputes the layer with its exchanges,
        # which must come before backward's own exchanges on every rank, also on one that had no rows.
        ctx.save_for_backward(rows_RD.new_empty(0), *saved.tensors)
        saved.tensors = ()
        return output_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise MoeError(
                f"layer {ctx.run.layer or '?'}: double backward (create_graph=True) does not pass through the exchange "
                "of an expert-parallel layer; take second derivatives of a model on one rank"
            )
        ctx.saved.tensors = ctx.saved_tensors[1:]
        sums = _GradientSums(ctx.params)

        def compute(grad_ND: Tensor, index: Ints, counts: list[int], start: Fraction) -> Tensor:
            grad, piece = take(grad_ND, index), ctx.pieces.get(start)
            if piece is None:
                return torch.zeros_like(grad)
            inputs = [piece.rows, *ctx.params]
            found = torch.autograd.grad([piece.output], inputs, [grad], retain_graph=True, allow_unused=True)
            sums.add(found[1:], (grad, found[0]))
            return grad.new_zeros(()).expand_as(grad) if found[0] is None else found[0]

        grad_RD = run_chunks(grads[0], ctx.run, compute, backward=True)
        ctx.saved.tensors = ()
        return (grad_RD if ctx.needs_input_grad[0] else None, None, None, *sums.result())


def _with_graph(run: LayerRun, rows_ND: Tensor, counts: list[int], keep: bool) -> tuple[Tensor, Piece | None]:
    if not keep:
        return _checked(run, rows_ND, run.experts(rows_ND, counts)), None
    leaf = _Leaf.apply(rows_ND, rows_ND.new_zeros((), requires_grad=True))
    assert isinstance(leaf, Tensor)
    output_ND = _checked(run, rows_ND, run.experts(leaf, counts))
    # An expert may ignore its rows and have nothing to train: then no gradient passes.
    piece = Piece(get_gradient_edge(leaf), get_gradient_edge(output_ND)) if output_ND.requires_grad else None
    return output_ND, piece


def _checked(run: LayerRun, rows_ND: Tensor, output_ND: Tensor) -> Tensor:
    if output_ND.shape != rows_ND.shape or output_ND.dtype != rows_ND.dtype:
        raise ContractError(
            f"layer {run.layer or '?'}: the experts got rows {tuple(rows_ND.shape)} {rows_ND.dtype} and returned "
            f"{tuple(output_ND.shape)} {output_ND.dtype}; both must be the same"
        )
    return output_ND


class _Leaf(torch.autograd.Function):
    """The rows of a piece, as the start of its graph; unlike a leaf tensor its node does not keep them in memory."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, anchor: Tensor) -> Tensor:
        return rows_ND.view_as(rows_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None


class _Weight(NamedTuple):
    param: nn.Parameter
    version: int


class _Saved:
    """What the graphs of the pieces saved, in the hands of the outer graph.

    So it is freed, recomputed or moved with everything else the outer graph saved: by backward, by activation
    checkpointing, by `save_on_cpu`. Left inside, checkpointing would recompute the layer once for every piece.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self._all: list[Tensor] = []
        self._versions: list[int] = []
        self._changed: set[int] = set()

    @contextmanager
    def collect(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self.tensors = (*self.tensors, *self._all)
        self._all = []

    def find_changed(self) -> None:
        """Note what was changed in place since it was saved: the outer graph sees only what is changed later."""
        pairs = zip(self.tensors, self._versions, strict=True)
        self._changed = {i for i, (tensor, version) in enumerate(pairs) if tensor._version != version}

    def _pack(self, tensor: Tensor) -> _Weight | int:
        if isinstance(tensor, nn.Parameter):
            return _Weight(tensor, tensor._version)
        self._all.append(tensor.detach())
        self._versions.append(tensor._version)
        return len(self.tensors) + len(self._all) - 1

    def _unpack(self, held: _Weight | int) -> Tensor:
        if isinstance(held, int):
            if held in self._changed:
                raise MoeError("the experts changed in place, in their forward, what their backward needs; use a copy")
            return self.tensors[held]
        # With hooks autograd leaves this check to them.
        if held.param._version != held.version:
            raise MoeError(
                f"a weight {tuple(held.param.shape)} of the experts was changed in place between forward and backward; "
                "run every backward before the optimizer's step"
            )
        return held.param


class _GradientSums:
    """Gradients of the expert parameters, summed over pieces in fp32 or wider; zeros for an expert without rows."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._sums: list[Tensor | None] = [None] * len(params)

    def add(self, grads: Sequence[Tensor | None], lent: Sequence[Tensor | None]) -> None:
        """Add the gradients of one piece; `lent` are others that may not be written to: those of its rows."""
        places = Counter(_memory(grad) for grad in (*grads, *lent) if grad is not None)
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            held = self._sums[i]
            if held is None:
                # Where two parameters were added up, or one to a single row, one tensor is the gradient of both; where
                # elements were, expanded.
                is_own = places[_memory(grad)] == 1 and 0 not in grad.stride()
                self._sums[i] = grad if is_own else grad.clone(memory_format=torch.contiguous_format)
            else:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self._sums[i] = held.to(wide).add_(grad)

    def result(self) -> list[Tensor]:
        pairs = zip(self._params, self._sums, strict=True)
        return [torch.zeros_like(p) if held is None else held.to(p.dtype) for p, held in pairs]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
