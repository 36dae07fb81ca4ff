"""From any format into ours, and from ours (or any) into another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpointing.checkpointer import SINGLE, Checkpointer
from checkpointing.errors import FormatError
from checkpointing.formats import Source, write_target
from checkpointing.retention import KeepLast


class _Opened:
    """A source as a Stateful."""

    def __init__(self, source: Source, read: Callable[[int], None]) -> None:
        self._source, self._read = source, read

    def state_dict(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name, lazy in self._source.tensors.items():
            tensors[name] = lazy.read().detach()
            self._read(tensors[name].numel() * tensors[name].element_size())
        tensors |= {name: tensors[first] for name, first in self._source.aliases.items()}
        return tensors | dict(self._source.values)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        raise NotImplementedError("a source is only read")


def save_source(source: Source, dest: Path, step: int | None, read: Callable[[int], None]) -> Path:
    """Commit `source` as a checkpoint of the run in the folder `dest`, prune nothing, and return its folder."""
    number = step if step is not None else source.step if source.step is not None else 0
    with Checkpointer(dest, keep=KeepLast(2**31), group=SINGLE) as ckpt:
        if (newest := ckpt.latest()) is not None:
            ckpt.adopt(newest)
        return ckpt.save(number, _Opened(source, read)).wait()


def restore_source(
    source: Source,
    dest: Path,
    kind: str,
    *,
    world_size: int,
    only: str | None,
    dtype: str | None,
    note: Callable[[str], None],
    wrote: Callable[[int], None],
) -> None:
    """Write `source`, or a part of it, in another format. Raises FormatError before anything is written."""
    if kind == "longrail":
        raise FormatError("`checkpoint save` writes checkpoints of this format")
    if only is not None:
        source = source.only(only)
    if dtype is not None:
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise FormatError(f"--dtype {dtype} is no floating-point dtype of torch; bfloat16, float16 or float32")
        source = source.cast(found)
    write_target(kind, source, dest, world_size=world_size, note=note, wrote=wrote)
