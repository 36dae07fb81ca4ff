"""Average dense gradients in slices, inside the backward of MoE layers, in a plain PyTorch loop.

    reducer = GradientReducer(model.named_parameters(), group=dp_group, queue=inter_queue)
    with reducer.accumulate():            # all micro-batches but the last
        loss(model, first).backward()
    loss(model, last).backward()          # MoE layers call reducer.drain on their way
    reducer.flush()                       # what is left; gradients are final after this
    reducer.clip_grad_norm_(1.0)
    optimizer.step()

Hooks only note that a gradient is there. Slices have borders that no plan moves, so results are bit for bit the same
however many bytes each layer drains; the order of slices is fixed, so every rank issues alike. A slice whose gradients
changed after it was sent (another graph than the plan was made for, a backward that failed) is sent again by `flush`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe.errors import MoeConfigError
from moe.issue import IssueQueue, Ticket
from moe.plan import LayerPlan
from moe.slices import Piece, Slice, cut


@dataclass(slots=True)
class _Sent:
    """A slice on its way, the buffer its sum arrives in, and what it was made of."""

    buffer: torch.Tensor
    ticket: Ticket
    grads: list[_Seen]


class _Seen(NamedTuple):
    """A gradient as it was at some time; None where there was none."""

    grad: torch.Tensor | None
    version: int

    @classmethod
    def of(cls, p: torch.nn.Parameter) -> _Seen:
        return cls(p.grad, -1 if p.grad is None else p.grad._version)

    def holds(self, p: torch.nn.Parameter) -> bool:
        return self.grad is p.grad and self.version == _Seen.of(p).version


class GradientReducer:
    """Sums gradients over data-parallel ranks and divides by their number, partly while MoE layers are at work.

    Every rank of `group` makes one, with the same parameters, and calls the same methods in the same order. Parameters
    with `is_expert` are never summed over `group`: over `expert_group`, the ranks with the same experts, where there is
    one. They too are divided by the size of `group`, since an expert has already summed what all ranks sent to it.
    A parameter without a gradient on some ranks counts as zero there; one without on all keeps None.

    With `model`, `flush` refuses to go on where that has parameters to train which the reducer does not know.
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
        model: torch.nn.Module | None = None,
    ) -> None:
        if slice_bytes < 64:
            raise MoeConfigError(f"slice_bytes is {slice_bytes}; a slice has at least 64 bytes")
        named = {name: p for name, p in _unique(named_parameters) if p.requires_grad}
        self._experts = {name: p for name, p in named.items() if getattr(p, "is_expert", False)}
        self._dense = {name: p for name, p in named.items() if name not in self._experts}
        self.slices = cut(self._dense.items(), slice_bytes)
        self._model, self._known = model, {id(p) for p in named.values()}
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

        Raises ExchangeError when a peer is lost or late, MoeConfigError when the model got parameters to train since.
        """
        try:
            self._require_known()
            while self._next < len(self.slices):
                self._send(self.slices[self._next], "flush")
            late, present = self._agree()
            for part in late:
                self._sent[part.index].ticket.result()  # its buffer is filled anew
                self._send(part, "flush again", count=False)
            for part in self.slices:
                self._finish(part, present)
            self._reduce_experts(present)
            self.ready_bytes = self._drained_ready
        finally:
            self._reset()

    def clip_grad_norm_(self, max_norm: float, *, ep_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Scale all gradients so that their norm over the whole model is at most `max_norm`; returns the norm.

        `ep_group` holds the ranks whose experts differ (None: one rank has them all). Call after `flush`.
        Raises ExchangeError when a rank is lost or late.
        """
        dense, experts = squares(self._dense.values()), squares(self._experts.values())
        if ep_group is not None:
            run = partial(dist.all_reduce, experts, group=ep_group)
            self._queue.call(run, op="squares of experts", call="clip_grad_norm_")
        norm = (dense + experts).sqrt()
        scale_down((*self._dense.values(), *self._experts.values()), norm, max_norm)
        return norm

    def close(self) -> None:
        """Take the hooks off; layers that still call `drain` send nothing."""
        self._armed = False
        for hook in self._hooks:
            hook.remove()

    def _reset(self) -> None:
        self._next = 0
        self._there: set[str] = set()
        self._sent: dict[int, _Sent] = {}
        self._drained_ready: list[int] = []

    def _note(self, name: str) -> None:
        if self._armed:
            self._there.add(name)

    def _require_known(self) -> None:
        for name, p in () if self._model is None else self._model.named_parameters():
            if p.requires_grad and id(p) not in self._known:
                raise MoeConfigError(
                    f"{name} was added or unfrozen after this reducer was made, and would stay different on every "
                    "rank; close the reducer and attach a new one"
                )

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
        self._sent[part.index] = _Sent(buffer, ticket, [_Seen.of(self._dense[piece.name]) for piece in part.pieces])
        self._next += count

    def _flat(self, piece: Piece) -> torch.Tensor:
        p = self._dense[piece.name]
        if p.grad is None:  # unused here: zeros, so that the average is that of all ranks
            return p.new_zeros(piece.stop - piece.start)
        if p.grad.layout != torch.strided:
            raise MoeConfigError(f"the gradient of {piece.name} is {p.grad.layout}; use dense gradients (sparse=False)")
        return p.grad.reshape(-1)[piece.start : piece.stop]

    def _agree(self) -> tuple[list[Slice], set[str]]:
        """Return slices that changed on some rank after it sent them, and parameters with a gradient on some."""
        params = {**self._dense, **self._experts}
        flags = torch.tensor(
            [*map(self._is_late, self.slices), *(p.grad is not None for p in params.values())], dtype=torch.int32
        )
        if len(flags):
            agree = self._queue.submit(
                lambda: dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group), layer="flush", op="late slices"
            )
            agree.result()
        late, present = flags[: len(self.slices)].tolist(), flags[len(self.slices) :].tolist()
        late_slices = [part for part, is_late in zip(self.slices, late, strict=True) if is_late]
        return late_slices, {name for name, is_present in zip(params, present, strict=True) if is_present}

    def _is_late(self, part: Slice) -> bool:
        pairs = zip(part.pieces, self._sent[part.index].grads, strict=True)
        return not all(seen.holds(self._dense[piece.name]) for piece, seen in pairs)

    def _finish(self, part: Slice, present: set[str]) -> None:
        sent = self._sent[part.index]
        sent.ticket.result()
        total = sent.buffer.div_(self._divisor) if self._divisor > 1 else sent.buffer
        offset = 0
        for piece in part.pieces:
            p, size = self._dense[piece.name], piece.stop - piece.start
            if piece.name in present:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if not p.grad.is_contiguous():
                    p.grad = p.grad.contiguous()
                p.grad.view(-1)[piece.start : piece.stop].copy_(total[offset : offset + size])
            offset += size

    def _reduce_experts(self, present: set[str]) -> None:
        for name, p in self._experts.items():
            if name not in present:
                continue
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
