"""Average dense gradients in slices, inside the backward of MoE layers, in a plain PyTorch loop.

    reducer = GradientReducer(model.named_parameters(), group=dp_group, queue=inter_queue)
    with reducer.accumulate():            # all micro-batches but the last
        loss(model, first).backward()
    loss(model, last).backward()          # MoE layers call reducer.drain on their way
    reducer.flush()                       # what is left; gradients are final after this
    reducer.clip_grad_norm_(1.0)
    optimizer.step()

Hooks only note that a gradient is there. Slices have borders that no plan moves, so results are bit for bit the same
however many bytes each layer drains; the order of slices is fixed, so every rank issues alike. A slice that was sent
before all of its gradients came (another graph than the plan was made for) is sent again by `flush`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe.errors import MoeConfigError
from moe.issue import IssueQueue, Ticket
from moe.plan import LayerPlan


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start .. stop` of one flattened parameter."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Slice:
    """What is reduced in one go: pieces of one dtype on one device."""

    index: int
    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(slots=True)
class _Sent:
    """A slice on its way, and the buffer its sum arrives in."""

    buffer: torch.Tensor
    ticket: Ticket | None = field(default=None)


def cut(parameters: Iterable[tuple[str, torch.Tensor]], slice_bytes: int) -> list[Slice]:
    """Cut parameters, last first, into slices of at most `slice_bytes`; a slice holds one dtype and device."""
    slices: list[Slice] = []
    pieces: list[Piece] = []
    used, kind = 0, None

    def close() -> None:
        nonlocal pieces, used
        if pieces:
            slices.append(Slice(len(slices), tuple(pieces), used))
        pieces, used = [], 0

    for name, p in reversed(list(parameters)):
        if (p.dtype, p.device) != kind:
            close()
            kind = (p.dtype, p.device)
        start, size = 0, p.element_size()
        while start < p.numel():
            room = (slice_bytes - used) // size
            if room < 1:
                close()
                continue
            stop = min(p.numel(), start + room)
            pieces.append(Piece(name, start, stop))
            used += (stop - start) * size
            start = stop
    close()
    return slices


class GradientReducer:
    """Sums gradients over data-parallel ranks and divides by their number, partly while MoE layers are at work.

    Every rank of `group` makes one, with the same parameters, and calls the same methods in the same order. Parameters
    with `is_expert` are never summed over `group`: over `expert_group`, the ranks with the same experts, where there is
    one. They too are divided by the size of `group`, since an expert has already summed what all ranks sent to it.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        group: dist.ProcessGroup | None,
        queue: IssueQueue,
        expert_group: dist.ProcessGroup | None = None,
        slice_bytes: int = 1 << 20,
        average: bool = True,
    ) -> None:
        if slice_bytes < 64:
            raise MoeConfigError(f"slice_bytes is {slice_bytes}; a slice has at least 64 bytes")
        named = {name: p for name, p in _unique(named_parameters) if p.requires_grad}
        self._experts = {name: p for name, p in named.items() if getattr(p, "is_expert", False)}
        self._dense = {name: p for name, p in named.items() if name not in self._experts}
        self.slices = cut(self._dense.items(), slice_bytes)
        self._group, self._expert_group, self._queue = group, expert_group, queue
        self._divisor = dist.get_world_size(group) if average else 1
        self._armed = True
        self._reset()
        self.ready_bytes: list[int] = []
        """For each drain of the last backward, in order: bytes of the leading slices whose gradients were all there."""
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda _, name=name: self._note(name))
            for name, p in self._dense.items()
        ]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward passes inside add to the gradients without sending any."""
        before, self._armed = self._armed, False
        try:
            yield
        finally:
            self._armed = before

    def drain(self, layer: str, plan: LayerPlan) -> int:
        """Issue the next slices, whole ones of at most `plan.gradient_bytes` together; return their bytes, not waiting.

        Called by the backward of an MoE layer between its last dispatch and its first combine, on every rank: give it
        to the layer as `runner.drain`.
        """
        if not self._armed:
            return 0
        self._drained_ready.append(self._ready_prefix())
        used = 0
        while self._next < len(self.slices) and used + self.slices[self._next].nbytes <= plan.gradient_bytes:
            used += self.slices[self._next].nbytes
            self._send(self.slices[self._next], layer)
        return used

    def flush(self) -> None:
        """Send the rest, wait for everything, and put the results into `.grad`. Every rank calls, once a step.

        Raises ExchangeError when a peer is lost or late.
        """
        try:
            while self._next < len(self.slices):
                self._send(self.slices[self._next], "flush")
            again = self._agree_on_late()
            for index in again:
                sent = self._sent[index]
                assert sent.ticket is not None
                sent.ticket.result()  # its buffer is filled anew
                self._send(self.slices[index], "flush again", count=False)
            for part in self.slices:
                self._finish(part)
            self._reduce_experts()
            self.ready_bytes = self._drained_ready
        finally:
            self._reset()

    def clip_grad_norm_(self, max_norm: float, *, ep_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Scale all gradients so that their norm over the whole model is at most `max_norm`; returns the norm.

        `ep_group` holds the ranks whose experts differ (None: one rank has them all). Call after `flush`.
        """
        dense, experts = squares(self._dense.values()), squares(self._experts.values())
        if ep_group is not None:
            dist.all_reduce(experts, group=ep_group)
        norm = (dense + experts).sqrt()
        scale_down((*self._dense.values(), *self._experts.values()), norm, max_norm)
        return norm

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _reset(self) -> None:
        self._next = 0
        self._there: set[str] = set()
        self._sent_names: set[str] = set()
        self._late: set[str] = set()
        self._sent: dict[int, _Sent] = {}
        self._drained_ready: list[int] = []

    def _note(self, name: str) -> None:
        if not self._armed:
            return
        self._there.add(name)
        if name in self._sent_names:
            self._late.add(name)

    def _ready_prefix(self) -> int:
        total = 0
        for part in self.slices:
            if not all(piece.name in self._there for piece in part.pieces):
                break
            total += part.nbytes
        return total

    def _send(self, part: Slice, layer: str, *, count: bool = True) -> None:
        flat = [self._flat(piece) for piece in part.pieces]
        buffer = torch.cat(flat) if len(flat) > 1 else flat[0].clone()
        ticket = self._queue.submit(
            lambda: dist.all_reduce(buffer, group=self._group), layer=layer, op=f"gradient {part.index}"
        )
        self._sent[part.index] = _Sent(buffer, ticket)
        self._sent_names.update(piece.name for piece in part.pieces)
        self._next += count

    def _flat(self, piece: Piece) -> torch.Tensor:
        p = self._dense[piece.name]
        if p.grad is None:  # unused here: zeros, so that the average is that of all ranks
            return p.new_zeros(piece.stop - piece.start)
        if p.grad.layout != torch.strided:
            raise MoeConfigError(f"the gradient of {piece.name} is {p.grad.layout}; use dense gradients (sparse=False)")
        return p.grad.reshape(-1)[piece.start : piece.stop]

    def _agree_on_late(self) -> list[int]:
        """Return the slices that some rank sent before all of its gradients were there."""
        flags = torch.tensor(
            [any(p.name in self._late for p in part.pieces) for part in self.slices], dtype=torch.int32
        )
        if len(flags):
            agree = self._queue.submit(
                lambda: dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group), layer="flush", op="late slices"
            )
            agree.result()
        return [i for i, late in enumerate(flags.tolist()) if late]

    def _finish(self, part: Slice) -> None:
        sent = self._sent[part.index]
        assert sent.ticket is not None
        sent.ticket.result()
        total = sent.buffer.div_(self._divisor) if self._divisor > 1 else sent.buffer
        offset = 0
        for piece in part.pieces:
            p, size = self._dense[piece.name], piece.stop - piece.start
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if not p.grad.is_contiguous():
                p.grad = p.grad.contiguous()
            p.grad.view(-1)[piece.start : piece.stop].copy_(total[offset : offset + size])
            offset += size

    def _reduce_experts(self) -> None:
        for name, p in self._experts.items():
            if p.grad is None:  # an expert without tokens here may have had some on another rank
                p.grad = torch.zeros_like(p)
            grad: Any = p.grad
            if self._expert_group is not None:
                self._queue.submit(
                    lambda grad=grad: dist.all_reduce(grad, group=self._expert_group),
                    layer="flush",
                    op=f"expert {name}",
                ).result()
            if self._divisor > 1:
                grad.div_(self._divisor)


def _unique(named: Iterable[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield tied parameters once: their gradient is one tensor, summed once."""
    seen: set[int] = set()
    for name, p in named:
        if id(p) not in seen:
            seen.add(id(p))
            yield name, p


def squares(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return the sum of the squares of all gradients; fp64, 0-d, on the CPU."""
    total = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        if p.grad is not None:
            total += torch.linalg.vector_norm(p.grad.detach(), dtype=torch.float64).cpu() ** 2
    return total


def scale_down(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm, which is `norm`, is at most `max_norm`."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(scale.to(p.grad.device, p.grad.dtype))
