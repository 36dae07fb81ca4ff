"""The fields of a manifest, one strict reader each. Pure; all raise IntegrityError naming the field."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

from checkpointing.errors import IntegrityError
from checkpointing.objects import ENCODINGS
from checkpointing.records import FileEntry, TensorEntry
from checkpointing.values import decode

_MAX = 2**63 - 1
_MAX_DIMS = 64
# No separators, no leading dot: a name that can only mean a file in the folder. And never a pickle.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{16}", re.ASCII)
_HASHES = re.compile(r"(?:[0-9a-f]{16})*", re.ASCII)
# A part of it becomes a part of folder names.
_RUN = re.compile(r"[0-9a-f]{32}", re.ASCII)

FILE_FIELDS_1 = ("path", "length", "xxh3_64")
FILE_FIELDS = ("path", "length", "head_bytes", "xxh3_64", "pieces")


def file_fields(file: FileEntry, pieces: str) -> dict[str, Any]:
    """Return a file as JSON; `pieces` are the hashes of its pieces, one behind the other."""
    return dict(zip(FILE_FIELDS, (file.path, file.length, file.head_bytes, file.xxh3_64, pieces), strict=True))


def read_int(record: Mapping[str, Any], field: str, *, low: int = 0) -> int:
    """Return an int field between `low` and 2**63 - 1."""
    return read_number(record.get(field), field, low)


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


def read_files_1(body: Mapping[str, Any]) -> tuple[FileEntry, ...]:
    """Return the files of a format-1 manifest, where one hash covers a whole file."""
    return _distinct([_file(record, FILE_FIELDS_1) for record in read_list(body, "files")])


def read_files(body: Mapping[str, Any]) -> tuple[tuple[FileEntry, ...], dict[str, str]]:
    """Return the files, plain names, no two alike; and the hashes of their pieces, by path."""
    records = read_list(body, "files")
    files = _distinct([_file(record, FILE_FIELDS) for record in records])
    pieces = {file.path: record["pieces"] for file, record in zip(files, records, strict=True)}
    for path, text in pieces.items():
        if not isinstance(text, str) or not _HASHES.fullmatch(text):
            raise IntegrityError(f"manifest: the hashes of {path!r} are not groups of 16 hex digits")
    return files, pieces


def read_piece_bytes(body: Mapping[str, Any]) -> int:
    """Return where pieces end: at multiples of this, which is one of a page."""
    number = read_int(body, "piece_bytes", low=4096)
    if number % 4096:
        raise IntegrityError(f"manifest: piece_bytes is {number}; a multiple of 4096 was expected")
    return number


def read_aliases(body: Mapping[str, Any], tensors: Sequence[TensorEntry]) -> dict[str, str]:
    """Return the aliases: new names of tensors that are there."""
    names = {tensor.name for tensor in tensors}
    aliases = read_object(body, "aliases")
    for alias, target in aliases.items():
        if not isinstance(target, str) or target not in names or alias in names or not alias:
            raise IntegrityError(f"manifest: alias {alias!r} of {target!r} is not a new name of a tensor")
    return dict(aliases)


def read_objects(body: Mapping[str, Any], tensors: Sequence[TensorEntry]) -> dict[str, str]:
    """Return the objects: names of whole U8 tensors, to their encoding."""
    objects = read_object(body, "objects")
    plain = {one.name for one in tensors if one.dtype == "U8" and one.shape == one.global_shape and len(one.shape) == 1}
    for name, encoding in objects.items():
        if name not in plain:
            raise IntegrityError(f"manifest: object {name!r} is not a whole U8 tensor of one dim")
        if encoding not in ENCODINGS:
            raise IntegrityError(f"manifest: object {name!r} is {encoding!r}; upgrade longrail, or it is damaged")
    return dict(objects)


def read_values(body: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the values, decoded, under names that are not `taken`."""
    values = read_object(body, "values")
    for name in values:
        if not name or name in taken:
            raise IntegrityError(f"manifest: value {name!r} is empty or has the name of a tensor")
    return {name: decode(value) for name, value in values.items()}


def read_record(record: object, kind: str, expected: Sequence[str]) -> dict[str, Any]:
    """Return an object with exactly the expected fields."""
    if not isinstance(record, dict) or len(record) != len(expected) or not all(map(record.__contains__, expected)):
        raise IntegrityError(f"manifest: an entry of {kind} has not the fields {', '.join(expected)}")
    return record


def read_number(value: object, what: str, low: int, tensor: str | None = None) -> int:
    """Return an int between `low` and 2**63 - 1; `tensor` is whose it is."""
    if type(value) is not int or not low <= value <= _MAX:
        what = what if tensor is None else f"{what} of tensor {tensor!r}"
        raise IntegrityError(f"manifest: {what} is {str(value)[:40]}; an integer from {low} to 2**63 - 1 was expected")
    return value


def read_dims(value: object, name: str) -> tuple[int, ...]:
    """Return a shape or an offset."""
    if not isinstance(value, list) or len(value) > _MAX_DIMS:
        raise IntegrityError(f"manifest: a shape of tensor {name!r} is not a list of at most {_MAX_DIMS} integers")
    for dim in value:
        if type(dim) is not int or not 0 <= dim <= _MAX:
            read_number(dim, f"a dim of tensor {name!r}", 0)
    if prod(max(dim, 1) for dim in value) > _MAX:  # also of a tensor without elements: torch could not make it
        raise IntegrityError(f"manifest: the shape of tensor {name!r} is too large to be one")
    return tuple(value)


def read_hash(value: object, what: str) -> str:
    """Return 16 hex digits."""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise IntegrityError(f"manifest: the hash of {what!r} is not 16 hex digits")
    return value


def read_list(body: Mapping[str, Any], field: str) -> list[Any]:
    """Return a list field."""
    if not isinstance(body.get(field), list):
        raise IntegrityError(f"manifest: {field} is not a list")
    return body[field]


def read_object(body: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return an object field."""
    if not isinstance(body.get(field), dict):
        raise IntegrityError(f"manifest: {field} is not an object")
    return body[field]


def _file(record: object, expected: Sequence[str]) -> FileEntry:
    found = read_record(record, "FileEntry", expected)
    path = found["path"]
    if not isinstance(path, str) or not _FILE.fullmatch(path):
        raise IntegrityError(f"manifest: file {path!r} is not a plain name of a .safetensors file in the folder")
    length = read_number(found["length"], f"length of {path}", 8)
    head_bytes = read_number(found.get("head_bytes", length), f"head_bytes of {path}", 8)
    if head_bytes > length:
        raise IntegrityError(f"manifest: {path} has {length} bytes and a head of {head_bytes}")
    return FileEntry(path, length, head_bytes, read_hash(found["xxh3_64"], path))


def _distinct(files: list[FileEntry]) -> tuple[FileEntry, ...]:
    if len({file.path for file in files}) != len(files):
        raise IntegrityError("manifest: a file stands twice in files")
    return tuple(files)
