"""A restore, as every rank runs it: rank 0 reads and hashes everything, then each rank reads what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from checkpointing.control import Control, run_round, told_as
from checkpointing.datafile import empty_tensor
from checkpointing.errors import CheckpointError, IntegrityError
from checkpointing.folder import Folder, check_step
from checkpointing.objects import load_object
from checkpointing.records import Manifest, RestoreInfo, Stateful, TensorEntry
from checkpointing.state import State, parts_of, under
from checkpointing.transfer import read_tensor


def restore(
    control: Control, folder: Folder, known_bad: set[int], what: str, state: State, step: int | None
) -> RestoreInfo | None:
    """Restore `state`; every rank must call. `known_bad` learns on rank 0 what did not verify."""
    parts: dict[str, Stateful] = {}
    read: dict[str, Any] = {}

    def ready() -> dict[str, Any]:
        if step is not None:
            check_step(step)
        parts.update(parts_of(state))
        return {}

    def verdict(bodies: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [_verdict(control, folder, known_bad, step)] * len(bodies)

    def load() -> dict[str, Any]:
        read.update(_read(control, folder, answer, parts))
        return {}

    def apply() -> dict[str, Any]:
        for prefix, part in parts.items():
            part.load_state_dict(under(prefix, read))
        return {}

    answer = run_round(control, what, "verify", ready, verdict)
    if answer["step"] is None:
        return None
    run_round(control, what, "read", load, _agreed)
    # A part may refuse what it is given; its own error is the cause on that rank, and the other ranks are told.
    run_round(control, what, "apply", apply, _agreed)
    skipped = tuple((Path(path), reason) for path, reason in answer["skipped"])
    return RestoreInfo(answer["step"], folder.at(answer["step"]), skipped)


def _agreed(bodies: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return bodies


@told_as(CheckpointError, "rank 0: ")
def _verdict(control: Control, folder: Folder, known_bad: set[int], step: int | None) -> dict[str, Any]:
    """Return the step to restore, or None when there is no checkpoint. Raises when there are, and none verifies."""
    candidates = folder.candidates()
    if step is not None and step not in candidates:
        raise CheckpointError(f"there is no step {step} in {folder.root}; there are: {candidates or 'none'}")
    skipped: list[tuple[str, str]] = []
    for one in reversed(candidates) if step is None else [step]:
        try:
            found = folder.verify(one, control.alive)
        except IntegrityError as error:
            known_bad.add(one)
            skipped.append((str(folder.at(one)), str(error)))
            continue
        known_bad.discard(one)
        return {"step": one, "identity": _identity(found), "skipped": skipped}
    if step is None and not any(folder.has_manifest(one) for one in candidates):
        return {"step": None}
    # Starting over in silence would throw a run away; someone has to look.
    reasons = "; ".join(reason for _, reason in skipped)
    raise IntegrityError(f"nothing to restore in {folder.root}: {reasons}. To start over, move these folders away")


def _identity(found: Manifest) -> list[str]:
    hashes = xxhash.xxh3_64_hexdigest("".join(one for entry in found.tensors for one in entry.hashes).encode())
    return [found.run_id, hashes, *(f"{file.path} {file.length} {file.xxh3_64}" for file in found.files)]


@told_as(CheckpointError)
def _read(control: Control, folder: Folder, answer: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """Return every name under the prefixes: tensors read and hashed, and values."""
    found = folder.inspect(answer["step"])
    if _identity(found) != answer["identity"]:
        raise IntegrityError(f"{folder.at(answer['step'])} is another checkpoint on rank 0; is this a shared folder?")
    wanted = {name for prefix in prefixes for name in _names_under(prefix, found)}
    sources = {found.aliases.get(name, name) for name in wanted}
    tensors = _read_tensors(control, folder, found, [entry for entry in found.tensors if entry.name in sources])
    second = {alias: tensors[name] for alias, name in found.aliases.items() if name in tensors}
    named = tensors | second | dict(found.values)
    return {name: value for name, value in named.items() if name in wanted}


def _names_under(prefix: str, found: Manifest) -> list[str]:
    names = (*(entry.name for entry in found.tensors), *found.aliases, *found.values)
    return [name for name in names if not prefix or name.startswith(f"{prefix}.")]


def _read_tensors(control: Control, folder: Folder, found: Manifest, entries: Sequence[TensorEntry]) -> dict[str, Any]:
    tensors = {}
    for file in found.files:
        fd = folder.storage.open(folder.at(found.step) / file.path)
        try:
            for entry in sorted((one for one in entries if one.file == file.path), key=lambda one: one.begin):
                tensor, memory = empty_tensor(entry.dtype, entry.shape)
                where = f"step-{found.step}/{file.path}"
                read_tensor(folder.storage, fd, where, entry, found.piece_bytes, memory)
                if entry.shape != entry.global_shape:
                    tensor = _put(tensors.get(entry.name), entry, tensor)
                tensors[entry.name] = load_object(entry.name, memory) if entry.name in found.objects else tensor
                control.alive()
        finally:
            folder.storage.close(fd)
    return tensors


def _put(whole: torch.Tensor | None, entry: TensorEntry, part: torch.Tensor) -> torch.Tensor:
    if whole is None:
        whole, _ = empty_tensor(entry.dtype, entry.global_shape)
    whole[tuple(slice(at, at + size) for at, size in zip(entry.offset, entry.shape, strict=True))] = part
    return whole
