"""What the `checkpoint` command is given: a run, one step of it, or another tool's checkpoint; found, or refused."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError, IntegrityError
from checkpointing.folder import Folder, split_step
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage

_OTHER_TOOLS = (".safetensors", ".metadata", ".snapshot_metadata", "_model_states.pt")
"""How a name ends that is in the checkpoint of another tool."""


def split(text: str) -> tuple[str, int | None]:
    """Return (path, step) of `path` or `path@step`."""
    path, at, step = text.rpartition("@")
    if at and step.isascii() and step.isdigit():
        return inside(path), int(step)
    if at and Path(path).exists() and not Path(text).exists():
        raise CheckpointError(f"{step!r} is no step of {path}; give a number, as in {path}@20")
    return inside(text), None


def inside(text: str) -> str:
    """Return the folder of checkpoints where a text is that of the job around it; all else as it is.

    `run.folder` of launch.finetune has them in `checkpoints`. What is itself a run or a checkpoint of any tool stays.
    """
    inner = Path(text) / "checkpoints"
    if "://" in text or not inner.is_dir():
        return text
    around, within = Folder(Path(text), LocalStorage()), Folder(inner, LocalStorage())
    names = around.storage.names(around.root)
    other = "manifest.json" in names or any(name.endswith(_OTHER_TOOLS) for name in names)
    return text if other or around.is_of_a_run() or not within.is_of_a_run() else str(inner)


def folder_of(text: str) -> tuple[Folder, int | None]:
    """Return the folder of a run, and the step that was named. Raises CheckpointError on what is none."""
    path, step = split(text)
    if Path(path).is_file():
        raise CheckpointError(f"{path} is a file; give the folder of a run")
    root, storage = open_storage(path)
    root, named = split_step(root)
    folder = Folder(root, storage)
    if "://" in path and not storage.names(root):
        raise CheckpointError(f"{path} does not exist or is empty; give the folder of a run")
    if "://" not in path and not root.is_dir():
        raise CheckpointError(f"{path} does not exist; give the folder of a run")
    if not folder.is_of_a_run():
        raise CheckpointError(f"{path} is no folder of a run: {_said_of(folder)}")
    step, there = step if step is not None else named, folder.candidates()
    if step is not None and step not in there:
        raise CheckpointError(f"there is no step {step} in {root}; there are: {there or 'none'}")
    return folder, step


def _said_of(folder: Folder) -> str:
    """Say what a folder that is none of a run holds, and which one may have been meant."""
    names = sorted(folder.storage.names(folder.root))
    if "manifest.json" in names:
        return "it is one checkpoint, under another name; give the folder it was in"
    return f"it holds {', '.join(names[:3])} and no step-N; give the folder that a job saves to"


def is_ours(text: str) -> bool:
    """Return whether it is for the readers that need no torch: ours, or nothing that is there."""
    path = Path(split(text)[0])
    if "://" in text or not path.exists():
        return True
    return path.is_dir() and any(one.name == "manifest.json" or one.name.startswith("step-") for one in path.iterdir())


def newest(folder: Folder) -> int:
    """Return the newest committed step. Raises CheckpointError when there is none."""
    committed = folder.committed()
    if not committed:
        raise CheckpointError(f"there is no committed checkpoint in {folder.root}")
    return max(committed)


def source_of(text: str) -> Any:
    """Open a checkpoint of any format; say so when the newest of a run was not whole. Raises CheckpointError."""
    from checkpointing.formats import open_source

    path, step = split(text)
    opened = open_source(path if "://" in path else Path(path), step=step)
    if opened.kind == "longrail":
        folder, named = folder_of(text)
        if named is None and opened.step is not None:
            say_passed_over(folder, opened.step)
    return opened


def say_passed_over(folder: Folder, taken: int) -> None:
    """Say on stderr which newer steps are no whole checkpoints, where the newest was asked for."""
    for step in folder.candidates():
        if step > taken:
            try:
                folder.inspect(step)
            except IntegrityError as error:
                print(f"checkpoint: passed over, for step {taken}: {error}", file=sys.stderr)


def other_whole(folder: Folder, damaged: int | None) -> int | None:
    """Return the newest other step whose every byte is what was saved; reads them until one is."""
    for step in reversed(folder.candidates()):
        if step != damaged:
            with suppress(IntegrityError):
                folder.verify(step, lambda: None)
                return step
    return None
