"""The fields of a manifest, one strict reader each. Pure; all raise IntegrityError naming the field."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from math import prod
from typing import Any

from checkpointing.dtypes import DTYPES, itemsize
from checkpointing.errors import IntegrityError
from checkpointing.records import FileEntry, TensorEntry
from checkpointing.values import decode

_MAX = 2**63 - 1
_MAX_DIMS = 64
# No separators, no leading dot: a name that can only mean a file in the folder. And never a pickle.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{16}", re.ASCII)
# A part of it becomes a part of folder names.
_RUN = re.compile(r"[0-9a-f]{32}", re.ASCII)


_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in (FileEntry, TensorEntry)}


def fields_of(entry: FileEntry | TensorEntry) -> dict[str, Any]:
    """Return an entry as JSON."""
    return {name: getattr(entry, name) for name in _FIELDS[type(entry)]}


def read_int(record: Mapping[str, Any], field: str, *, low: int = 0) -> int:
    """Return an int field between `low` and 2**63 - 1."""
    return _int(record.get(field), field, low)


def read_text(record: Mapping[str, Any], field: str) -> str:
    """Return a string field that is not empty."""
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise IntegrityError(f"manifest: {field} is {value!r}; a string was expected")
    return value


def read_run_id(body: Mapping[str, Any]) -> str:
    """Return the run id: 32 hex digits."""
    run_id = body.get("run_id")
    if not isinstance(run_id, str) or not _RUN.fullmatch(run_id):
        raise IntegrityError(f"manifest: run_id is {str(run_id)[:40]!r}; 32 hex digits were expected")
    return run_id


def read_files(body: Mapping[str, Any]) -> tuple[FileEntry, ...]:
    """Return the files: plain names, no two alike."""
    files = tuple(_file(record) for record in _list(body, "files"))
    if len({file.path for file in files}) != len(files):
        raise IntegrityError("manifest: a file stands twice in files")
    return files


def read_tensors(body: Mapping[str, Any], files: Sequence[FileEntry]) -> tuple[TensorEntry, ...]:
    """Return the tensors: inside their files, sized as dtype and shape say, no two overlapping or named alike."""
    lengths = {file.path: file.length for file in files}
    tensors = tuple(_tensor(record, lengths) for record in _list(body, "tensors"))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise IntegrityError("manifest: a tensor stands twice in tensors")
    placed = sorted((tensor.file, tensor.begin, tensor.end, tensor.name) for tensor in tensors)
    for before, after in pairwise(placed):
        if before[0] == after[0] and before[2] > after[1]:
            raise IntegrityError(f"manifest: tensors {before[3]!r} and {after[3]!r} overlap in {after[0]}")
    return tensors


def read_aliases(body: Mapping[str, Any], tensors: Sequence[TensorEntry]) -> dict[str, str]:
    """Return the aliases: new names of tensors that are there."""
    names = {tensor.name for tensor in tensors}
    aliases = _object(body, "aliases")
    for alias, target in aliases.items():
        if not isinstance(target, str) or target not in names or alias in names or not alias:
            raise IntegrityError(f"manifest: alias {alias!r} of {target!r} is not a new name of a tensor")
    return dict(aliases)


def read_values(body: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the values, decoded, under names that are not `taken`."""
    values = _object(body, "values")
    for name in values:
        if not name or name in taken:
            raise IntegrityError(f"manifest: value {name!r} is empty or has the name of a tensor")
    return {name: decode(value) for name, value in values.items()}


def _file(record: object) -> FileEntry:
    found = _record(record, FileEntry)
    path = found["path"]
    if not isinstance(path, str) or not _FILE.fullmatch(path):
        raise IntegrityError(f"manifest: file {path!r} is not a plain name of a .safetensors file in the folder")
    return FileEntry(path, _int(found["length"], f"length of {path}", 8), _hash(found["xxh3_64"], path))


def _tensor(record: object, lengths: Mapping[str, int]) -> TensorEntry:
    found = _record(record, TensorEntry)
    name, dtype, file = (read_text(found, field) for field in ("name", "dtype", "file"))
    global_shape, offset, shape = (_dims(found[field], name) for field in ("global_shape", "offset", "shape"))
    begin, end = (_int(found[field], f"{field} of tensor {name!r}", 8) for field in ("begin", "end"))
    if dtype not in DTYPES:
        raise IntegrityError(f"manifest: tensor {name!r} has the dtype {dtype!r}; upgrade longrail, or it is damaged")
    if global_shape != shape or offset != (0,) * len(shape):
        raise IntegrityError(f"manifest: tensor {name!r} is a slice; format 1 holds whole tensors")
    if file not in lengths or end > lengths[file]:
        raise IntegrityError(f"manifest: tensor {name!r} lies outside of the files: {file!r}, bytes {begin}..{end}")
    if end - begin != prod(shape) * itemsize(dtype):
        raise IntegrityError(f"manifest: tensor {name!r}, {dtype} {list(shape)}, cannot have {end - begin} bytes")
    return TensorEntry(name, dtype, global_shape, offset, shape, file, begin, end, _hash(found["xxh3_64"], name))


def _record(record: object, kind: type[FileEntry] | type[TensorEntry]) -> dict[str, Any]:
    expected = _FIELDS[kind]
    if not isinstance(record, dict) or record.keys() != set(expected):
        raise IntegrityError(f"manifest: an entry of {kind.__name__} has not the fields {', '.join(expected)}")
    return record


def _int(value: object, what: str, low: int) -> int:
    if type(value) is not int or not low <= value <= _MAX:
        raise IntegrityError(f"manifest: {what} is {str(value)[:40]}; an integer from {low} to 2**63 - 1 was expected")
    return value


def _dims(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_DIMS:
        raise IntegrityError(f"manifest: a shape of tensor {name!r} is not a list of at most {_MAX_DIMS} integers")
    dims = tuple(_int(dim, f"a dim of tensor {name!r}", 0) for dim in value)
    if prod(max(dim, 1) for dim in dims) > _MAX:  # also of a tensor without elements: torch could not make it
        raise IntegrityError(f"manifest: the shape of tensor {name!r} is too large to be one")
    return dims


def _hash(value: object, what: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise IntegrityError(f"manifest: the hash of {what!r} is not 16 hex digits")
    return value


def _list(body: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(body.get(field), list):
        raise IntegrityError(f"manifest: {field} is not a list")
    return body[field]


def _object(body: Mapping[str, Any], field: str) -> dict[str, Any]:
    if not isinstance(body.get(field), dict):
        raise IntegrityError(f"manifest: {field} is not an object")
    return body[field]
