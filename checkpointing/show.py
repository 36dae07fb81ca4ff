"""What is in a folder and in a checkpoint, as plain records. Needs no torch, and reads no tensor."""

from __future__ import annotations

from collections import defaultdict
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from checkpointing.errors import IntegrityError
from checkpointing.folder import Folder
from checkpointing.records import Manifest, TensorEntry
from checkpointing.values import without_trees


def list_steps(folder: Folder) -> list[dict[str, Any]]:
    """Return a row for each step, oldest first: whole ones with run, files and bytes, others with the reason."""
    rows: list[dict[str, Any]] = []
    for step in folder.candidates():
        row: dict[str, Any] = {"step": step, "path": str(folder.at(step)), "ok": True}
        try:
            found = folder.inspect(step)
        except IntegrityError as error:
            rows.append({**row, "ok": False, "reason": str(error)})
            continue
        tensors = len({entry.name for entry in found.tensors})
        size = sum(file.length for file in found.files)
        rows.append({**row, "run_id": found.run_id, "world_size": found.world_size, "tensors": tensors, "bytes": size})
    return rows


def describe(manifest: Manifest, pattern: str = "*") -> dict[str, Any]:
    """Return the checkpoint as a record: files, tensors with their shards, aliases and values, and how many tensors.

    Of tensors, aliases and values those whose names match.
    """
    by_name: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in manifest.tensors:
        if fnmatchcase(entry.name, pattern):
            by_name[entry.name].append(entry)
    return {
        "step": manifest.step,
        "run_id": manifest.run_id,
        "world_size": manifest.world_size,
        "files": [{"path": file.path, "bytes": file.length} for file in manifest.files],
        "num_tensors": len({entry.name for entry in manifest.tensors}),
        "tensors": [_tensor(name, entries, manifest) for name, entries in sorted(by_name.items())],
        "aliases": {name: first for name, first in manifest.aliases.items() if fnmatchcase(name, pattern)},
        "values": {name: value for name, value in without_trees(manifest.values).items() if fnmatchcase(name, pattern)},
    }


def describe_source(source: Any, pattern: str = "*") -> dict[str, Any]:
    """Return an opened checkpoint of another format (`formats.Source`) as the same record; it has no files of ranks."""
    tensors = [
        {
            "name": name,
            "dtype": str(lazy.dtype).removeprefix("torch."),
            "shape": list(lazy.shape),
            "bytes": prod(lazy.shape) * lazy.dtype.itemsize,
            "shards": [],
        }
        for name, lazy in sorted(source.tensors.items())
        if fnmatchcase(name, pattern)
    ]
    return {
        "format": source.kind,
        "step": source.step,
        "num_tensors": len(source.tensors),
        "tensors": tensors,
        "aliases": {name: first for name, first in source.aliases.items() if fnmatchcase(name, pattern)},
        "values": {name: value for name, value in without_trees(source.values).items() if fnmatchcase(name, pattern)},
    }


def _tensor(name: str, entries: list[TensorEntry], manifest: Manifest) -> dict[str, Any]:
    shards = [
        {"file": entry.file, "offset": list(entry.offset), "shape": list(entry.shape), "bytes": entry.end - entry.begin}
        for entry in entries
    ]
    return {
        "name": name,
        "dtype": manifest.objects.get(name, entries[0].dtype),
        "shape": list(entries[0].global_shape),
        "bytes": sum(entry.end - entry.begin for entry in entries),
        "shards": shards,
    }
