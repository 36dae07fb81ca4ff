"""Our own checkpoints as a source: every tensor is verified as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpointing.errors import FormatError, IntegrityError
from checkpointing.folder import Folder, split_step
from checkpointing.formats.base import Lazy, Source
from checkpointing.load import read_global
from checkpointing.storage import open_storage
from checkpointing.torch_dtypes import DTYPES


def read(path: Path | str, step: int | None) -> Source:
    """Open a run's folder (its newest checkpoint, or `step`), or one checkpoint. Raises CheckpointError."""
    root, storage = open_storage(str(path))
    root, named = split_step(root)
    folder = Folder(root, storage)
    step = named if named is not None else step
    if step is None:
        committed = folder.committed()
        if not committed:
            raise FormatError(f"there is no committed checkpoint in {path}")
        step = max(committed)
    elif step not in (there := folder.candidates()):
        raise FormatError(f"there is no step {step} in {root}; there are: {there or 'none'}")
    with _damage_told_of(root):
        manifest = folder.inspect(step)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for entry in manifest.tensors:
        shapes.setdefault(entry.name, (entry.dtype, entry.global_shape))

    def lazy(name: str, dtype: str, shape: tuple[int, ...]) -> Lazy:
        def tensor() -> torch.Tensor:
            with _damage_told_of(root):
                return read_global(folder, manifest, name)

        return Lazy(DTYPES[dtype], shape, tensor)

    tensors = {name: lazy(name, dtype, shape) for name, (dtype, shape) in shapes.items()}
    return Source("longrail", folder.at(step), tensors, manifest.values, step, manifest.aliases)


@contextmanager
def _damage_told_of(root: Path) -> Iterator[None]:
    """Name the run of a damaged file: of two checkpoints that are compared, a file's own name may stand in both."""
    try:
        yield
    except IntegrityError as error:
        raise type(error)(f"{root}/{error}") from error
