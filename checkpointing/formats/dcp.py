"""torch.distributed.checkpoint folders. Their metadata is a pickle: read with a list of plain classes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.state_dict_saver import save

from checkpointing.errors import FormatError, StateError
from checkpointing.formats.base import Lazy, Source, Target
from checkpointing.formats.plain_pickle import UnpicklingError, load_plain
from checkpointing.formats.torch_pt import load
from checkpointing.nested import flatten
from checkpointing.reshard import Box, whole
from checkpointing.storage.local import LocalStorage

_RECORDS = (
    records.Metadata,
    records.TensorStorageMetadata,
    records.BytesStorageMetadata,
    records.ChunkStorageMetadata,
    records.MetadataIndex,
    records.StorageMeta,
    records.TensorProperties,
    records._MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
)
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def read(path: Path, step: int | None) -> Source:
    """Open a DCP folder. Raises FormatError naming what is refused or missing."""
    metadata = read_metadata(path)
    if not isinstance(metadata.storage_data, Mapping):
        raise FormatError(f"{path}/.metadata holds no places of tensors; was it written by FileSystemWriter?")
    tensors: dict[str, Lazy] = {}
    values: dict[str, Any] = {}
    for name, what in metadata.state_dict_metadata.items():
        if isinstance(what, records.TensorStorageMetadata):
            tensors[name] = _lazy(path, metadata, name, what)
        else:
            value = load(_slice(path, metadata, name, None), where=f"{path}: {name!r}")
            try:
                found, values[name] = flatten(value, name, taken=metadata.state_dict_metadata)
            except StateError as error:
                raise FormatError(f"value {name!r}: {error}") from error
            tensors |= {inner: Lazy.of(tensor) for inner, tensor in found.items()}
    return Source("dcp", path, tensors, values)


def read_metadata(path: Path) -> records.Metadata:
    """Return the metadata of a DCP folder, read as plain records. Raises FormatError."""
    allowed: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _RECORDS}
    # A path inside is only text to us; a layout is looked up by name.
    allowed |= {f"pathlib.{name}": _text for name in ("PosixPath", "PurePosixPath", "WindowsPath", "Path")}
    allowed |= {"pathlib._local.PosixPath": _text, "torch.serialization._get_layout": _layout, **_DTYPES}
    try:
        found = load_plain(LocalStorage().read(path / ".metadata"), allowed)
    except UnpicklingError as error:
        raise FormatError(f"{path}/.metadata is refused, and nothing in it was executed: {error}") from error
    except (OSError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise FormatError(f"{path}/.metadata cannot be read: {error}") from error
    if not isinstance(found, records.Metadata) or not isinstance(found.state_dict_metadata, Mapping):
        raise FormatError(f"{path}/.metadata is not DCP's")
    return found


def write(source: Source, target: Target) -> None:
    """Write a DCP folder with `world_size` files; it reshards by itself. Values keep their names."""
    nested = source.nested()  # DCP names what is inside by its path, as we do
    state = nested if isinstance(nested, dict) else {"state": nested}
    writer = FileSystemWriter(target.path, thread_count=target.world_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is one process that writes
        save(state, storage_writer=writer, no_dist=True)
    target.wrote(sum(tensor.numel() * tensor.element_size() for tensor in state.values() if torch.is_tensor(tensor)))


def _lazy(path: Path, metadata: records.Metadata, name: str, what: records.TensorStorageMetadata) -> Lazy:
    shape = tuple(what.size)

    def tensor() -> torch.Tensor:
        made = torch.empty(shape, dtype=what.properties.dtype)
        for chunk in what.chunks:
            part = load(_slice(path, metadata, name, chunk.offsets), where=f"{path}: {name!r}")
            if not torch.is_tensor(part) or tuple(part.shape) != tuple(chunk.sizes):
                raise FormatError(f"{path}: tensor {name!r} is not of the shape its metadata states")
            made[Box(tuple(chunk.offsets), tuple(chunk.sizes)).within(whole(shape))] = part
        return made

    return Lazy(what.properties.dtype, shape, tensor)


def _slice(path: Path, metadata: records.Metadata, name: str, offset: torch.Size | None) -> io.BytesIO:
    info = metadata.storage_data.get(records.MetadataIndex(name, offset))
    if not isinstance(info, _StorageInfo) or info.transform_descriptors:
        raise FormatError(f"{path}: {name!r} has no place in a file, or is compressed; load it with DCP itself")
    file = path / info.relative_path
    if file.resolve().parent != path.resolve():
        raise FormatError(f"{path}: {name!r} is said to be in {info.relative_path!r}, outside of the folder")
    data = bytearray(info.length)
    storage = LocalStorage()
    fd = storage.open(file)
    try:
        if storage.read_into(fd, memoryview(data), info.offset) != info.length:
            raise FormatError(f"{file}: {name!r} ends behind the end of the file")
    finally:
        storage.close(fd)
    return io.BytesIO(data)


def _text(*parts: str) -> str:
    return "/".join(map(str, parts))


def _layout(name: str) -> torch.layout:
    return torch.strided
