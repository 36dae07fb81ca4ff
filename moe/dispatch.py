"""Moving rows between ranks: the all-to-all, direct or over two levels, and the gather and scatter of shared experts.

All of them are synchronous, take uneven and zero sizes, and are called by every rank of their group in the same order.
Rows are any `[n, ...]`; `matrix_PP[i, j]` is the number that rank i of the `ep` axis sends to rank j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import MoeConfigError
from moe.precision import in_full
from moe.traffic import Ints


class Exchange(Protocol):
    """Dispatch; and combine, with the matrix transposed. Rows go out ordered by destination and come in by source."""

    def __call__(self, rows: Tensor, matrix_PP: Ints) -> Tensor:
        """Return the rows that the other ranks sent to this one."""
        ...


def stay(rows: Tensor, matrix_PP: Ints) -> Tensor:
    """Exchange of one rank with itself."""
    return rows


class DirectExchange:
    """One all-to-all over the whole `ep` axis."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, group.rank()

    def __call__(self, rows: Tensor, matrix_PP: Ints) -> Tensor:
        """Return the rows that the other ranks sent to this one."""
        return all_to_all(rows, matrix_PP[self.rank], matrix_PP[:, self.rank], self.group)


class TwoLevelExchange:
    """All-to-all in two steps, so that messages between nodes are few and large.

    `ep` rank `node * L + local` is rank `local` of `intra` (L ranks, one node) and rank `node` of `inter`.
    "2d" (Tutel): first to the rank of this node with the destination's local number, then between the nodes.
    "1d" (HetuMoE): to the first rank of this node, between the first ranks, and from there to the destination.
    """

    def __init__(self, intra: dist.ProcessGroup, inter: dist.ProcessGroup, *, levels: str = "2d") -> None:
        if levels not in ("1d", "2d"):
            raise MoeConfigError(f"an all-to-all over two levels is '1d' or '2d', not {levels!r}")
        self.intra, self.inter, self.levels = intra, inter, levels
        self.local, self.node = intra.rank(), inter.rank()

    def __call__(self, rows: Tensor, matrix_PP: Ints) -> Tensor:
        """Return the rows that the other ranks sent to this one."""
        num_nodes, num_locals = self.inter.size(), self.intra.size()
        # m[n, l, n', l']: rows from rank l of node n to rank l' of node n'
        m = matrix_PP.reshape(num_nodes, num_locals, num_nodes, num_locals)
        return self._two(rows, m) if self.levels == "2d" else self._one(rows, m)

    def _two(self, rows: Tensor, m: Ints) -> Tensor:
        n, own = self.node, self.local
        rows = permute_blocks(rows, m[n, own], (1, 0))  # (n', l') -> (l', n')
        rows = all_to_all(rows, m[n, own].sum(0), m[n, :, :, own].sum(1), self.intra)
        rows = permute_blocks(rows, m[n, :, :, own], (1, 0))  # (source l, n') -> (n', source l)
        return all_to_all(rows, m[n, :, :, own].sum(0), m[:, :, n, own].sum(1), self.inter)

    def _one(self, rows: Tensor, m: Ints) -> Tensor:
        n, own, is_first = self.node, self.local, self.local == 0
        nothing = m[n, :, 0, 0] * 0
        to_first, from_all = nothing.copy(), m[n].sum((1, 2)) if is_first else nothing
        to_first[0] = m[n, own].sum()
        rows = all_to_all(rows, to_first, from_all, self.intra)
        if is_first:
            rows = permute_blocks(rows, m[n], (1, 0, 2))  # (l, n', l') -> (n', l, l')
            rows = all_to_all(rows, m[n].sum((0, 2)), m[:, :, n].sum((1, 2)), self.inter)
            rows = permute_blocks(rows, m[:, :, n], (2, 0, 1))  # (n, l, l') -> (l', n, l)
        to_all, from_first = m[:, :, n].sum((0, 1)) if is_first else nothing, nothing.copy()
        from_first[0] = m[:, :, n, own].sum()
        return all_to_all(rows, to_all, from_first, self.intra)


def gather_rows(rows: Tensor, sizes: Ints | Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows of all ranks of the `esp` axis, in their order; `sizes[s]` of rank s."""
    if group is None:
        return rows
    copies = rows.repeat(group.size(), *[1] * (rows.dim() - 1))
    return all_to_all(copies, [len(rows)] * group.size(), sizes, group)


def scatter_sum(rows: Tensor, sizes: Ints | Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows that came from this rank, summed over the ranks of the `esp` axis: the way back of `gather_rows`.

    An all-to-all and a sum here, because the reduce-scatter of gloo moves the bytes twice.
    """
    if group is None:
        return rows
    own = int(sizes[group.rank()])
    parts = all_to_all(rows, sizes, [own] * group.size(), group)
    with in_full(parts):  # which on CUDA would sum in fp32, and return that
        return parts.view(group.size(), own, *rows.shape[1:]).sum(0)


def all_to_all(
    rows: Tensor, send: Ints | Sequence[int], receive: Ints | Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Return the received rows; `send[i]` go to rank i of the group and `receive[i]` come from it."""
    send, receive = [int(n) for n in send], [int(n) for n in receive]
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    # A receive of the wrong size is silent, or ends the process: sizes come from the checked exchange of counts only.
    assert sum(send) == len(rows), (send, len(rows))
    rows = rows.contiguous()
    if rows.device.type == "cpu":
        _receives_first(arrived, rows, receive, send, group)
    else:
        dist.all_to_all_single(arrived, rows, receive, send, group=group)
    return arrived


def _receives_first(
    arrived: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup
) -> None:
    """Do an all-to-all that uses both directions of a link at once, which gloo's own does not.

    That one posts its sends first, and then tells a peer behind its own rows that the peer may send: ranks that do not
    begin at the same moment take turns.
    """
    own, size = group.rank(), group.size()
    into, out = arrived.split(receive), rows.split(send)
    before, behind = ([(own + way * i) % size for i in range(1, size)] for way in (-1, 1))
    works: list[tuple[int, dist.Work | None]] = []
    peer = own
    try:
        for peer in before:
            if into[peer].numel():
                works.append((peer, dist.irecv(into[peer], group=group, group_src=peer)))
        for peer in behind:
            if out[peer].numel():
                works.append((peer, dist.isend(out[peer], group=group, group_dst=peer)))
        into[own].copy_(out[own])  # while the others are on their way
        for peer, work in works:  # noqa: B007 (the text of an error has it)
            assert work is not None
            work.wait()
    except RuntimeError as error:  # of which the text knows no rank
        lost = dist.get_global_rank(group, peer)
        raise RuntimeError(f"between this rank and rank {lost}: {error}") from error


def permute_blocks(rows: Tensor, sizes: Ints, order: tuple[int, ...]) -> Tensor:
    """Rows lie in blocks of `sizes`, an array read in C order; return them as its transpose by `order` has them."""
    blocks = rows.split([int(n) for n in sizes.ravel()])
    numbers = torch.arange(len(blocks)).view(sizes.shape).permute(order).reshape(-1)
    return torch.cat([blocks[int(i)] for i in numbers])
