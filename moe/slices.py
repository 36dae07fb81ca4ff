"""Dense gradients in slices: which elements of which parameters go over the link in one operation. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


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
