"""The manifest: what a checkpoint holds, in one JSON file that proves itself. Pure: bytes in, records out.

    {"xxh3_64":"<16 hex digits>","format_version":1,"run_id":...,"step":...,...}

The hash is that of every byte behind its own field, to the end of the file. This beginning, and the place of
`format_version` behind it, are the same in every version. The reader is strict: it takes what the writer writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from checkpointing.errors import IntegrityError
from checkpointing.manifest_fields import (
    fields_of,
    read_aliases,
    read_files,
    read_int,
    read_run_id,
    read_tensors,
    read_values,
)
from checkpointing.records import Manifest, Summary
from checkpointing.values import encode

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"

_HEAD = b'{"xxh3_64":"'
_BODY_AT = len(_HEAD) + 16 + 2  # behind the digits and `",`
_KEYS = {"xxh3_64", "format_version", "run_id", "step", "world_size", "files", "tensors", "aliases", "values"}


def dumps(manifest: Manifest) -> bytes:
    """Return the bytes of the file."""
    body = {
        "format_version": FORMAT_VERSION,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "files": [fields_of(file) for file in manifest.files],
        "tensors": [fields_of(tensor) for tensor in manifest.tensors],
        "aliases": dict(manifest.aliases),
        "values": {name: encode(name, value) for name, value in manifest.values.items()},
    }
    # ASCII, so that any string of Python's survives; the opening brace belongs to the head.
    rest = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")[1:] + b"\n"
    return _HEAD + xxhash.xxh3_64_hexdigest(rest).encode() + b'",' + rest


def loads(data: bytes) -> Manifest:
    """Read a manifest. Raises IntegrityError saying what is wrong with it, on anything `dumps` would not write."""
    body = _body(data)
    files = read_files(body)
    tensors = read_tensors(body, files)
    aliases = read_aliases(body, tensors)
    return Manifest(
        run_id=read_run_id(body),
        step=read_int(body, "step"),
        world_size=read_int(body, "world_size", low=1),
        files=files,
        tensors=tensors,
        aliases=aliases,
        values=read_values(body, {entry.name for entry in tensors} | set(aliases)),
    )


def loads_summary(data: bytes) -> Summary:
    """Read of a manifest what listing and retention need; the hash is proved, tensors and values are not looked at.

    Raises IntegrityError.
    """
    body = _body(data)
    return Summary(read_run_id(body), read_int(body, "step"), read_files(body))


def _body(data: bytes) -> Mapping[str, Any]:
    body = _parse(_proved(data))
    version = read_int(body, "format_version", low=1)
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"manifest has format_version {version} and this library reads up to {FORMAT_VERSION}; upgrade longrail"
        )
    if set(body) != _KEYS:
        raise IntegrityError(f"manifest fields differ from those of version 1: {sorted(set(body) ^ _KEYS)}")
    return body


def _proved(data: bytes) -> bytes:
    if not data.startswith(_HEAD) or data[_BODY_AT - 2 : _BODY_AT] != b'",':
        raise IntegrityError("manifest does not begin as one; it is damaged, or another program's")
    said = data[len(_HEAD) : _BODY_AT - 2]
    found = xxhash.xxh3_64_hexdigest(data[_BODY_AT:]).encode()
    if said != found:
        raise IntegrityError(f"manifest has the hash {found.decode()} and says {said!r}; it is damaged")
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
