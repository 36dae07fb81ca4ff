"""torchsnapshot folders, read by their JSON metadata; objects in them only where torch's safe reader takes them.

A tensor's name is its path below the rank: `0/model/fc.weight` is `model.fc.weight`. What rank 1 and higher hold alone
and under the same name is `rank1.<name>`. The state of each key, nested as it was, is the tree `tree.<key>`.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from checkpointing.errors import FormatError, StateError
from checkpointing.formats.base import Lazy, Source, Target
from checkpointing.formats.torch_pt import load
from checkpointing.nested import flatten, unflatten
from checkpointing.reshard import Box, whole
from checkpointing.storage.local import LocalStorage
from checkpointing.values import TREE, TREES

_CONTAINERS = ("dict", "OrderedDict", "list")


def read(path: Path, step: int | None) -> Source:
    """Open a torchsnapshot folder. Raises FormatError naming the entry that is refused or wrong."""
    try:
        manifest = json.loads(LocalStorage().read(path / ".snapshot_metadata"))["manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}/.snapshot_metadata cannot be read: {error}") from error
    tensors: dict[str, Lazy] = {}
    values: dict[str, Any] = {}
    shards: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    try:
        for key, entry in manifest.items():
            name = _name(key, (tensors, values), entry)
            if name is not None:
                _add(path, name, entry, tensors, values, shards)
        for name, parts in shards.items():
            tensors[name] = _sharded(path, name, parts)
        values = _trees(manifest, tensors, values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}/.snapshot_metadata is not torchsnapshot's: {error!r}") from error
    return Source("torchsnapshot", path, tensors, values)


def _trees(manifest: Mapping[str, Any], tensors: Container[str], values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with what stands under a key of rank 0 in that key's tree, where it is all there."""
    counts = Counter(path.rpartition("/")[0] for path in manifest)
    for key in [path for path in manifest if path.startswith("0/") and path.count("/") == 1]:
        used: set[str] = set()
        try:
            tree = _tree(key, manifest, counts, tensors, values, used)
        except KeyError:  # of a name that is taken, or that only another rank has
            continue
        if isinstance(tree, dict) and not any(name.startswith("$") for name in tree):
            values = {name: value for name, value in values.items() if name not in used}
            values[f"{TREES}{unquote(key.removeprefix('0/'))}"] = tree
    return values


def _tree(
    path: str,
    manifest: Mapping[str, Any],
    counts: Mapping[str, int],
    tensors: Container[str],
    values: Mapping[str, Any],
    used: set[str],
) -> Any:
    """Return what stands at a path as `checkpointing.nested` has it; the names of its values are added to `used`."""
    entry, name = manifest[path], ".".join(unquote(part) for part in path.split("/")[1:])
    if entry["type"] not in _CONTAINERS:
        used.add(name)
        return {"$tensor": name} if name in tensors else values[name]

    def inner(key: Any) -> Any:
        quoted = str(key).replace("%", "%25").replace("/", "%2F")
        return _tree(f"{path}/{quoted}", manifest, counts, tensors, values, used)

    if entry["type"] == "list":
        return [inner(index) for index in range(counts[path])]
    keys = entry["keys"]
    if all(type(key) is str for key in keys) and not (len(keys) == 1 and keys[0].startswith("$")):
        return {key: inner(key) for key in keys}
    return {"$dict": [[key, inner(key)] for key in keys]}


def write(source: Source, target: Target) -> None:
    """Write a snapshot that any number of ranks can restore; the first part of a name is the key of its Stateful."""
    import torchsnapshot

    odd = [name for name, one in source.tensors.items() if one.dtype is torch.bfloat16 and prod(one.shape) % 2]
    if odd:
        raise FormatError(
            f"torchsnapshot cannot hold {odd[0]!r}, bfloat16 of an odd number of elements (it drops the last one); "
            "write it with --dtype float32"
        )
    flat: dict[str, Any]
    nested = source.nested() if TREE in source.values else None
    if isinstance(nested, dict):  # torchsnapshot names what is inside by its path, as we do
        flat = {
            f"{key}.{inner}" if isinstance(value, dict) else key: one
            for key, value in nested.items()
            for inner, one in (value.items() if isinstance(value, dict) else ((key, value),))
        }
    else:
        flat = {name: lazy.read() for name, lazy in source.tensors.items()}
        flat |= {name: flat[first] for name, first in source.aliases.items()}
        flat |= {name: unflatten(value, flat.__getitem__) for name, value in source.values.items()}
    states: dict[str, Any] = defaultdict(torchsnapshot.StateDict)
    for key in [name.removeprefix(TREES) for name in source.values if name.startswith(TREES)]:
        states[key] = torchsnapshot.StateDict(**flat.pop(f"{TREES}{key}"))
    for name, value in flat.items():
        if any(name.startswith(f"{key}.") for key in states if f"{TREES}{key}" in source.values):
            continue  # it is in there
        key, dot, rest = name.partition(".")
        states[key if dot else "state"][rest if dot else name] = value
    torchsnapshot.Snapshot.take(str(target.path), dict(states), replicated=["**"])
    target.wrote(sum(tensor.numel() * tensor.element_size() for tensor in flat.values() if torch.is_tensor(tensor)))


def _name(key: str, taken: Iterable[Container[str]], entry: Mapping[str, Any]) -> str | None:
    rank, *parts = key.split("/")
    if entry["type"] in _CONTAINERS or not parts:
        return None
    name = ".".join(unquote(part) for part in parts)
    if not any(name in names for names in taken) or entry["type"] == "ShardedTensor":
        return name
    return None if entry.get("replicated") else f"rank{int(rank)}.{name}"


def _add(
    path: Path,
    name: str,
    entry: Mapping[str, Any],
    tensors: dict[str, Lazy],
    values: dict[str, Any],
    shards: dict[str, list[Mapping[str, Any]]],
) -> None:
    kind = entry["type"]
    if kind == "Tensor":
        tensors[name] = _lazy(path, name, entry)
    elif kind == "ShardedTensor":
        shards[name] += entry["shards"]
    elif kind == "ChunkedTensor":
        tensors[name] = _sharded(path, name, entry["chunks"])
    elif kind == "object":
        if entry["serializer"] != "torch_save":
            raise FormatError(f"{path}: {name!r} is serialized by {entry['serializer']!r}, which is not read")
        try:
            found, values[name] = flatten(load(io.BytesIO(_bytes(path, entry)), where=f"{path}: {name!r}"), name)
        except StateError as error:
            raise FormatError(f"{path}: {error}") from error
        tensors |= {inner: Lazy.of(tensor) for inner, tensor in found.items()}
    else:
        values[name] = _primitive(kind, entry["serialized_value"])


def _primitive(kind: str, text: str) -> Any:
    plain = {"int": int, "str": str, "bool": lambda text: text == "True"}
    if kind in plain:
        return plain[kind](text)
    data = base64.b64decode(text)
    return struct.unpack("d", data)[0] if kind == "float" else {"$bytes": text}


def _lazy(path: Path, name: str, entry: Mapping[str, Any]) -> Lazy:
    dtype = getattr(torch, str(entry["dtype"]).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"{path}: tensor {name!r} has the dtype {entry['dtype']!r}, which is not one")
    shape = tuple(int(dim) for dim in entry["shape"])

    def tensor() -> torch.Tensor:
        data = _bytes(path, entry)
        if entry["serializer"] == "torch_save":
            return load(io.BytesIO(data), where=f"{path}: {name!r}")
        if len(data) != torch.Size(shape).numel() * dtype.itemsize:
            raise FormatError(f"{path}: tensor {name!r} has {len(data)} bytes, which is not {dtype} {list(shape)}")
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    return Lazy(dtype, shape, tensor)


def _sharded(path: Path, name: str, parts: list[Mapping[str, Any]]) -> Lazy:
    pieces = [(Box(tuple(part["offsets"]), tuple(part["sizes"])), _lazy(path, name, part["tensor"])) for part in parts]
    shape = tuple(max(box.ends[dim] for box, _ in pieces) for dim in range(len(pieces[0][0].offset)))

    def tensor() -> torch.Tensor:
        made = torch.empty(shape, dtype=pieces[0][1].dtype)
        for box, lazy in pieces:
            made[box.within(whole(shape))] = lazy.read()
        return made

    return Lazy(pieces[0][1].dtype, shape, tensor)


def _bytes(path: Path, entry: Mapping[str, Any]) -> bytearray:
    file = path / entry["location"]
    if not file.resolve().is_relative_to(path.resolve()):
        raise FormatError(f"{path}: an entry is said to be in {entry['location']!r}, outside of the folder")
    storage = LocalStorage()
    try:
        begin, end = entry.get("byte_range") or (0, storage.length(file))
        data = bytearray(end - begin)
        fd = storage.open(file)
        try:
            if storage.read_into(fd, memoryview(data), begin) != len(data):
                raise FormatError(f"{file} ends before byte {end}")
        finally:
            storage.close(fd)
    except OSError as error:
        raise FormatError(f"{file}: {error.strerror}") from error
    return data
