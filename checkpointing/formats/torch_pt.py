"""torch's own files, read with `weights_only=True`: a file that would run code is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import FormatError
from checkpointing.formats.base import Source, Target, of_tree
from checkpointing.formats.plain_pickle import UnpicklingError


def read(path: Path, step: int | None) -> Source:
    """Open a .pt file. Raises FormatError on one that holds more than tensors and plain values."""
    return of_tree("torch", path, load(path))


def write(source: Source, target: Target) -> None:
    """Write the nested state the source was made from, or else a flat dict of its names."""
    torch.save(source.nested(), target.path)
    target.wrote(target.path.stat().st_size)


def load(file: Path | io.BytesIO, allowed: Sequence[Any] = (), where: str = "") -> Any:
    """Return what is in a torch file, mapped where its format allows; only `allowed` classes may be made.

    Raises FormatError naming `where`, by default the file.
    """
    where = where or str(file)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))
            except RuntimeError:  # the format before 1.6 cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise FormatError(f"{where} is refused, and nothing in it was executed: {_refusal(str(error))}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AssertionError, AttributeError) as error:
        raise FormatError(f"{where} cannot be read as a torch file: {str(error).splitlines()[0]}") from error


def _refusal(text: str) -> str:
    """Return the line of torch's advice that says what was asked for."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if "Unsupported" in line or "WeightsUnpickler" in line), lines[0])
