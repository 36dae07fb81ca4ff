"""The manifest: what a checkpoint holds, in one JSON file that proves itself. Pure: bytes in, records out.

    {"xxh3_64":"<16 hex digits>","format_version":2,"run_id":...,"step":...,...}

The hash is that of every byte behind its own field, to the end of the file. This beginning, and the place of
`format_version` behind it, are the same in every version. The reader is strict: it takes what the writer writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import xxhash

from checkpointing.errors import IntegrityError, VersionError
from checkpointing.manifest_fields import (
    file_fields,
    read_aliases,
    read_files,
    read_files_1,
    read_int,
    read_object,
    read_objects,
    read_piece_bytes,
    read_run_id,
    read_values,
)
from checkpointing.manifest_tensors import (
    hashes_of_files,
    read_rows,
    read_tensors,
    read_tensors_1,
    rows_of,
    tensor_text,
)
from checkpointing.pieces import WHOLE
from checkpointing.records import FileEntry, Manifest, Summary, TensorEntry
from checkpointing.values import encode

FORMAT_VERSION = 2
FILE_NAME = "manifest.json"

_HEAD = b'{"xxh3_64":"'
_BODY_AT = len(_HEAD) + 16 + 2  # behind the digits and `",`
_TABLE, _BEHIND = b',"tensors":[', b'],"aliases":'
_KEYS_1 = {"xxh3_64", "format_version", "run_id", "step", "world_size", "files", "tensors", "aliases", "values"}
_KEYS = {1: _KEYS_1, 2: _KEYS_1 | {"piece_bytes", "objects"}}


def dumps(manifest: Manifest) -> bytes:
    """Return the bytes of the file."""
    pieces = hashes_of_files(manifest.tensors, (file.path for file in manifest.files))
    return assemble(
        manifest,
        files=[file_fields(file, pieces[file.path]) for file in manifest.files],
        table=dumps_table(manifest.tensors),
    )


def dumps_table(tensors: Sequence[TensorEntry]) -> bytes:
    """Return the table of tensors as JSON: the part of a manifest that does not change from save to save."""
    return f"[{','.join(map(tensor_text, tensors))}]".encode("ascii")


def assemble(manifest: Manifest, *, files: Sequence[Mapping[str, Any]], table: bytes) -> bytes:
    """Return the bytes of the file from its parts; the tensors and files of `manifest` itself are not looked at."""
    begin = {
        "format_version": FORMAT_VERSION,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "piece_bytes": manifest.piece_bytes,
        "files": files,
    }
    end = {
        "aliases": dict(manifest.aliases),
        "objects": dict(manifest.objects),
        "values": {name: encode(name, value) for name, value in manifest.values.items()},
    }
    # The opening brace belongs to the head.
    rest = b"".join((_text(begin)[1:-1], b',"tensors":', table, b",", _text(end)[1:], b"\n"))
    return _HEAD + xxhash.xxh3_64_hexdigest(rest).encode() + b'",' + rest


def loads(data: bytes) -> Manifest:
    """Read a manifest of any version. Raises IntegrityError saying what is wrong, on anything `dumps` never wrote."""
    split = _split(_proved(data))
    if split is not None:
        with suppress(IntegrityError):  # what it is, is told below
            return _manifest(*split)
    return _manifest(_checked(_parse(data)))


def _manifest(body: Mapping[str, Any], rows: list[tuple[str, ...]] | None = None) -> Manifest:
    """Make the manifest; `rows` is the table of tensors where it was taken out of `body`."""
    if body["format_version"] == 1:
        piece_bytes, objects = WHOLE, {}
        files = read_files_1(body)
        tensors = read_tensors_1(body, files)
    else:
        piece_bytes = read_piece_bytes(body)
        files, pieces = read_files(body)
        tensors = (
            read_tensors(body, files, pieces, piece_bytes)
            if rows is None
            else read_rows(rows, files, pieces, piece_bytes)
        )
        objects = read_objects(body, tensors)
    aliases = read_aliases(body, tensors)
    return Manifest(
        run_id=read_run_id(body),
        step=read_int(body, "step"),
        world_size=read_int(body, "world_size", low=1),
        piece_bytes=piece_bytes,
        files=files,
        tensors=tensors,
        aliases=aliases,
        objects=objects,
        values=read_values(body, {entry.name for entry in tensors} | set(aliases)),
    )


def _split(data: bytes) -> tuple[Mapping[str, Any], list[tuple[str, ...]]] | None:
    """Return the rest of a manifest and its table of tensors in rows, when both are in the writer's form; else None."""
    found = _without_table(data)
    if found is None:
        return None
    with suppress(ValueError):
        rows = rows_of(found[1].decode("ascii"))
        return None if rows is None else (found[0], rows)
    return None


def _without_table(data: bytes) -> tuple[Mapping[str, Any], bytes] | None:
    """Return the rest of a manifest, and its table of tensors unread, when the rest is in the writer's form."""
    begin = data.find(_TABLE)
    end = data.find(_BEHIND, begin)
    if min(begin, end) < 0:
        return None
    try:
        # That what stands before the table is an object once it is closed proves that the table is a field of it.
        before, behind = _parse(data[:begin] + b"}"), _parse(b"{" + data[end + 2 :])
        body = {**before, "tensors": [], **behind}
        if len(body) != len(before) + 1 + len(behind) or body.get("format_version") != FORMAT_VERSION:
            return None
        return _checked(body), data[begin + len(_TABLE) : end]
    except IntegrityError:
        return None


def loads_summary(data: bytes) -> Summary:
    """Read of a manifest what listing and retention need; the hash is proved, tensors and values are not looked at.

    Raises IntegrityError.
    """
    found = _without_table(_proved(data))
    body = _checked(_parse(data)) if found is None else found[0]
    files: tuple[FileEntry, ...] = read_files_1(body) if body["format_version"] == 1 else read_files(body)[0]
    return Summary(read_run_id(body), read_int(body, "step"), files, read_object(body, "values"))


def _text(value: Any) -> bytes:
    # ASCII, so that any string of Python's survives.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _checked(body: Mapping[str, Any]) -> Mapping[str, Any]:
    version = read_int(body, "format_version", low=1)
    if version > FORMAT_VERSION:
        raise VersionError(
            f"manifest has format_version {version} and this library reads up to {FORMAT_VERSION}; upgrade longrail"
        )
    if set(body) != _KEYS[version]:
        raise IntegrityError(
            f"manifest fields differ from those of version {version}: {sorted(set(body) ^ _KEYS[version])}"
        )
    return body


def _proved(data: bytes) -> bytes:
    if not data.startswith(_HEAD) or data[_BODY_AT - 2 : _BODY_AT] != b'",':
        raise IntegrityError("manifest does not begin as one; it is damaged, or another program's")
    said = data[len(_HEAD) : _BODY_AT - 2]
    found = xxhash.xxh3_64_hexdigest(data[_BODY_AT:]).encode()
    if said != found:
        raise IntegrityError(
            f"manifest has the hash {found.decode()} and says {said.decode(errors='replace')!r}; it is damaged"
        )
    return data


def _parse(data: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(data.decode("ascii"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"manifest is not strict JSON: {error}") from error
    if not isinstance(body, dict):
        raise IntegrityError("manifest is not a JSON object")
    return body


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
