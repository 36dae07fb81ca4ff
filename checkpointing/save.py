"""A save, as every rank runs it: describe, get the plan, write, get the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from checkpointing.commit import Committer
from checkpointing.control import Control, run_round, told_as
from checkpointing.datafile import bytes_of, file_name, layout
from checkpointing.errors import CheckpointError, RankError, SaveError
from checkpointing.folder import Folder, check_step
from checkpointing.manifest import FORMAT_VERSION
from checkpointing.records import FileEntry, SaveProgress, TensorSpec
from checkpointing.state import FlatState, State, flatten
from checkpointing.transfer import write_file


@dataclass(slots=True)
class Meter:
    """Counts the bytes of one save on this rank."""

    written_bytes: int = 0
    total_bytes: int = 0
    done: bool = False

    def read(self) -> SaveProgress:
        """Return the count as a value."""
        return SaveProgress(self.written_bytes, self.total_bytes, self.done)


def save(
    control: Control, folder: Folder, committer: Committer, what: str, step: int, state: State, meter: Meter
) -> Path:
    """Save `state`; every rank must call. Returns the committed folder, or raises the same error on every rank."""
    flat: list[FlatState] = []

    def describe() -> dict[str, Any]:
        check_step(step)
        with told_as(SaveError):
            flat.append(flatten(state))
        return _description(flat[0])

    task = run_round(control, what, "plan", describe, lambda bodies: committer.open(step, bodies))
    try:
        with told_as(SaveError):
            run_round(
                control, what, "commit", lambda: _write(control, folder, flat[0], step, task, meter), committer.commit
            )
    except BaseException as error:
        # A silent rank may still be writing; its folder is left to a later save.
        committer.abandon(remove=isinstance(error, CheckpointError) and not isinstance(error, RankError))
        raise
    meter.done = True
    return folder.at(step)


def _description(flat: FlatState) -> dict[str, Any]:
    specs = [[spec.name, spec.dtype, list(spec.shape), spec.alias_of] for spec in flat.specs]
    return {"specs": specs, "values": flat.values}


@told_as(SaveError)
def _write(
    control: Control, folder: Folder, flat: FlatState, step: int, task: Mapping[str, Any], meter: Meter
) -> dict[str, Any]:
    """Write this rank's file. Returns its entry, and (begin, end, hash) of each tensor in it."""
    by_name = {spec.name: spec for spec in flat.specs}
    specs = [by_name[name] for name in task["names"]]
    placed = layout(specs, _metadata(control, step, task["run_id"]))
    meter.total_bytes = placed.length

    def wrote(num_bytes: int) -> None:
        meter.written_bytes += num_bytes
        control.alive()

    name = file_name(control.rank)
    blocks = [lambda: placed.head, *(_block(flat, spec) for spec in specs)]
    hashes = write_file(folder.storage, folder.root / task["folder"] / name, placed.length, blocks, wrote)
    places = [[begin, end, one] for (begin, end), one in zip(placed.ranges, hashes[1:], strict=True)]
    return {
        "file": asdict(FileEntry(name, placed.length, len(placed.head), xxh3_64_hexdigest(placed.head))),
        "places": places,
    }


def _block(flat: FlatState, spec: TensorSpec) -> Callable[[], memoryview | bytes]:
    return lambda: bytes_of(flat.tensors[spec.name])


def _metadata(control: Control, step: int, run_id: str) -> dict[str, str]:
    """Return what a reader of the lone file is told; safetensors allows strings only."""
    return {
        "format": "pt",
        "longrail_format_version": str(FORMAT_VERSION),
        "run_id": run_id,
        "step": str(step),
        "rank": str(control.rank),
        "world_size": str(control.world_size),
    }
