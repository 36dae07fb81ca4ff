"""Tensors that ranks hold as ranges of their elements, told as rows: what a checkpoint of any engine holds.

ZeRO gives every rank a range of a flattened parameter, which may begin and end within a row. A row belongs to the rank
that holds its first element; the others give that rank their part of it, at every save, and nothing else is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from checkpointing import Mutability, TensorProvider
from checkpointing.providers import Cost, Place


@dataclass(frozen=True, slots=True)
class Range:
    """Elements `start .. start + size` of a tensor, row-major."""

    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def row(self) -> int:
        """Elements of a row."""
        return prod(self.shape[1:])

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.size

    @property
    def first(self) -> int:
        """The first row that begins here."""
        return -(-self.start // self.row)

    @property
    def last(self) -> int:
        """One past the last row that begins here."""
        return -(-self.stop // self.row)

    @property
    def lead(self) -> int:
        """Elements before the first row that begins here: another rank's row."""
        return min(self.first * self.row, self.stop) - self.start


@dataclass(frozen=True, slots=True)
class RowsProvider:
    """Rows of which most lie in live memory, and the end of the last one in a copy: a `checkpointing.Provider`."""

    live: Tensor
    """1-D, contiguous."""
    tail: Tensor
    """1-D, on the host, of the same dtype."""
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    dtype: str
    mutability: Mutability
    encoding: None = None

    @property
    def place(self) -> Place:
        """Where the live part is."""
        return Place.HOST if self.live.device.type == "cpu" else Place.DEVICE

    @property
    def cost(self) -> Cost:
        """Nothing on the host; a copy from a device."""
        return Cost.VIEW if self.place is Place.HOST else Cost.COMPUTE

    def chunks(self) -> Iterator[memoryview]:
        """Yield the live part, then the copy."""
        for part in (self.live, self.tail):
            yield _bytes(part).cpu().numpy().data


def provider_of(held: Range, live: Tensor, tail: Tensor, mutability: Mutability) -> TensorProvider | RowsProvider:
    """Return a provider of the rows that begin in a range; there is at least one.

    `live` are the range's own elements, `tail` those of its last row that other ranks hold.
    """
    rows = held.last - held.first
    own = live[held.lead :]
    if not held.shape:
        return TensorProvider(own.view(()), mutability)
    shape, at = (rows, *held.shape[1:]), (held.first, *([0] * (len(held.shape) - 1)))
    if not tail.numel():
        return TensorProvider(own.view(shape), mutability, whole=held.shape, at=at)
    name = TensorProvider(own).dtype
    return RowsProvider(own, tail, shape, held.shape, at, name, mutability)


class RowExchange:
    """Hands the parts of rows to the ranks that they belong to. Made on every rank, with its ranges by name."""

    def __init__(self, ranges: Mapping[str, Range], group: dist.ProcessGroup) -> None:
        self._group, self._ranges = group, dict(ranges)
        every: list[dict[str, Range]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(every, self._ranges, group=group)
        self._every = every

    def tails(self, values: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Return, for each name and each of its values, the elements that this rank's last row lacks, on the host.

        Every rank calls, with the same number of values of the same dtypes for a name. Their elements are those of
        the rank's range.
        """
        given = [values[name][n][: r.lead] for name, n, r in self._leads(dist.get_rank(self._group), values)]
        packed = [_bytes(one) for one in given]
        mine = torch.cat(packed) if packed else torch.zeros(0, dtype=torch.uint8)
        parts = self._gather(mine)
        found: dict[tuple[str, int, int], Tensor] = {}
        for rank, part in enumerate(parts):
            at = 0
            for name, n, r in self._leads(rank, values):
                size = r.lead * values[name][n].itemsize
                found[name, n, r.start] = part[at : at + size].clone()  # aligned to whatever its elements are
                at += size
        return {name: [self._tail(name, n, one, found) for n, one in enumerate(of)] for name, of in values.items()}

    def _leads(self, rank: int, values: Mapping[str, Sequence[Tensor]]) -> Iterator[tuple[str, int, Range]]:
        for name, held in self._every[rank].items():
            if held.lead:
                yield from ((name, n, held) for n in range(len(values[name])))

    def _gather(self, mine: Tensor) -> list[Tensor]:
        sizes: list[int] = [0] * len(self._every)
        dist.all_gather_object(sizes, len(mine), group=self._group)
        most = max(sizes)
        if not most:
            return [mine[:0].cpu()] * len(sizes)
        padded = torch.cat([mine, mine.new_zeros(most - len(mine))])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        return [part[:size].cpu() for part, size in zip(parts, sizes, strict=True)]

    def _tail(self, name: str, n: int, value: Tensor, found: Mapping[tuple[str, int, int], Tensor]) -> Tensor:
        held = self._ranges.get(name)
        parts, at = [], 0 if held is None else held.stop
        while held is not None and held.last > held.first and at < held.last * held.row:
            part = found[name, n, at].view(value.dtype)
            parts.append(part)
            at += len(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=value.dtype)


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous()
    # Of one element any stride counts as contiguous, but only a stride of 1 can be viewed as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
