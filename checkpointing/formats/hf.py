"""A Hugging Face model folder: .safetensors files, their index, and the small files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpointing.errors import FormatError
from checkpointing.formats.base import FILES, Lazy, Source, Target, model_names
from checkpointing.storage.local import LocalStorage
from checkpointing.torch_dtypes import DTYPES

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9
_OTHER_BYTES = 64 * 2**20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


def read(path: Path, step: int | None) -> Source:
    """Open a folder, or one .safetensors file. Raises FormatError naming the file that is wrong or missing."""
    files = [path] if path.is_file() else _weight_files(path)
    tensors: dict[str, Lazy] = {}
    for file in files:
        for name, lazy in _tensors(file):
            if name in tensors:
                raise FormatError(f"{path}: tensor {name!r} stands in two files; one of them is {file.name}")
            tensors[name] = lazy
    if path.is_dir():
        tensors |= _other_files(path)
    return Source("hf", path, tensors)


def write(source: Source, target: Target) -> None:
    """Write the model of `source` as a folder. Raises FormatError when it holds no model."""
    storage = LocalStorage()
    storage.make_folder(target.path)
    names = model_names(source)
    if not names:
        raise FormatError(f"{source.path} has no tensors named model.*; there is no model to write")
    others = {name: _file_name(source, name) for name in source.tensors if name.startswith(FILES)}
    shards = list(_shards(source, names))
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _read(source, names[name]).clone().contiguous() for name in shard}
        save_file(tensors, str(target.path / file), metadata={"format": "pt"})
        (target.path / file).chmod(target.path.stat().st_mode & 0o666)  # by the umask: safetensors lets its owner only
        weight_map |= dict.fromkeys(shard, file)
        target.wrote(sum(t.numel() * t.element_size() for t in tensors.values()))
    if len(shards) > 1:
        total = sum(_num_bytes(source, name) for name in names.values())
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        storage.write_new(target.path / _INDEX, index_text.encode())
    for name, file in others.items():
        storage.write_new(target.path / file, bytes(source.tensors[name].read().numpy()))
    if f"{FILES}config.json" not in others:
        target.note("the checkpoint has no config.json and no tokenizer; copy them from the base model")


def _file_name(source: Source, name: str) -> str:
    """Return the name of a small file. Raises FormatError on one that would be written outside of the folder."""
    file = name.removeprefix(FILES)
    if not file or Path(file).name != file or file == ".." or "\0" in file:
        raise FormatError(f"{source.path}: {name!r} does not name a file in the folder; nothing was written")
    return file


def _weight_files(path: Path) -> list[Path]:
    index = path / _INDEX
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(LocalStorage().read(index.resolve()))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index} is not an index of weights: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise FormatError(f"{index} names {name!r}, which is not a file in the folder")
        if not (path / name).is_file():
            raise FormatError(f"{index} names {name}, which is missing")
    return [path / name for name in names]


def _tensors(file: Path) -> Iterator[tuple[str, Lazy]]:
    try:
        opened = safe_open(str(file), framework="pt")
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            part = opened.get_slice(name)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in DTYPES:
                raise FormatError(f"{file}: tensor {name!r} has the dtype {dtype}, which is not one we can hold")
            yield name, Lazy(DTYPES[dtype], shape, lambda opened=opened, name=name: opened.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is no .safetensors file: {error}") from error


def _other_files(path: Path) -> dict[str, Lazy]:
    found = {}
    for file in sorted(path.iterdir()):
        small = file.is_file() and file.stat().st_size <= _OTHER_BYTES
        if small and not file.name.startswith(".") and file.suffix not in _WEIGHTS and file.name != _INDEX:
            data = bytearray(LocalStorage().read(file.resolve()))  # in the Hub's cache all are links
            tensor = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            found[f"{FILES}{file.name}"] = Lazy.of(tensor)
    return found


def _shards(source: Source, names: dict[str, str]) -> Iterator[list[str]]:
    shard, size = [], 0
    for name in names:
        num_bytes = _num_bytes(source, names[name])
        if shard and size + num_bytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += num_bytes
    yield shard


def _num_bytes(source: Source, name: str) -> int:
    lazy = source.tensors[source.aliases.get(name, name)]
    return torch.Size(lazy.shape).numel() * lazy.dtype.itemsize


def _read(source: Source, name: str) -> torch.Tensor:
    return source.tensors[source.aliases.get(name, name)].read()
