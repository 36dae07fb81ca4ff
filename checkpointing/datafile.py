"""One rank's data file: a valid .safetensors file (8-byte length, JSON header, bytes). Pure.

The header is padded with spaces to whole pages, so that the bytes begin on a page and any aligned writer can be used.
It is written last: only then are the sizes of the objects known, which lie behind all tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from json.encoder import encode_basestring

import torch

from checkpointing.dtypes import shape_in_file
from checkpointing.errors import SaveError
from checkpointing.records import TensorSpec

_PAGE = 4096
_MAX_HEADER = 100_000_000  # what the safetensors library accepts
_SPARE = 64  # for metadata that grows, and for each object's numbers


@dataclass(frozen=True, slots=True)
class DataLayout:
    """Where the tensors of a file lie, and its header. A function of the specs; of a save only its metadata differ."""

    specs: tuple[TensorSpec, ...]
    """In the order of the file: tensors, then objects."""
    head_bytes: int
    """Bytes before the first tensor: length field, header, padding."""
    ranges: tuple[tuple[int, int], ...]
    """(begin, end) of each tensor in the file, in order, without gaps."""
    tensors_text: bytes
    """The tensors' part of the header, as JSON without its braces."""

    @property
    def end(self) -> int:
        """One past the last byte of the tensors."""
        return self.ranges[-1][1] if self.ranges else self.head_bytes

    def object_ranges(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (begin, end) of each object, whose sizes are known by now."""
        return list(pairwise(accumulate(sizes, initial=self.end)))

    def head(self, metadata: Mapping[str, str], sizes: Sequence[int] = ()) -> bytes:
        """Return everything before the first tensor. Raises SaveError when the metadata are longer than foreseen."""
        objects = self.specs[len(self.ranges) :]
        parts = [f'"__metadata__":{_json(metadata)}'.encode(), self.tensors_text]
        for spec, size, (begin, end) in zip(objects, sizes, self.object_ranges(sizes), strict=True):
            entry = _header_entry(spec.name, "U8", [size], begin - self.head_bytes, end - self.head_bytes)
            parts.append(entry.encode())
        text = b"{" + b",".join(part for part in parts if part) + b"}"
        if 8 + len(text) > self.head_bytes:
            raise SaveError(f"a header of {len(text)} bytes does not fit into {self.head_bytes - 8}")
        text = text.ljust(self.head_bytes - 8)
        return len(text).to_bytes(8, "little") + text


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> DataLayout:
    """Lay `specs` out in the given order, objects last.

    Raises SaveError when the header grows beyond what readers accept.
    """
    tensors = [spec for spec in specs if spec.encoding is None]
    ends = list(accumulate((spec.num_bytes for spec in tensors), initial=0))
    entries = [
        _header_entry(spec.name, spec.dtype, shape_in_file(spec.dtype, spec.shape), begin, end)
        for spec, (begin, end) in zip(tensors, pairwise(ends), strict=True)
    ]
    text = ",".join(entries).encode()
    names = sum(len(_json(spec.name)) + 2 * _SPARE for spec in specs[len(tensors) :])
    size = 8 + len(text) + len(_json(metadata)) + names + 2 * _SPARE
    size += -size % _PAGE
    if size - 8 > _MAX_HEADER:
        raise SaveError(
            f"{len(specs)} tensors make a header of {size - 8} bytes; {_MAX_HEADER} is the limit: save fewer tensors "
            "per rank, or larger ones"
        )
    return DataLayout(tuple(specs), size, tuple((size + a, size + b) for a, b in pairwise(ends)), text)


def slices_text(specs: Sequence[TensorSpec]) -> str:
    """Return, as JSON for a reader of the lone file, which slices it holds: {name: [global shape, offset]}."""
    return _json({spec.name: [spec.whole_shape, spec.begin] for spec in specs if spec.shape != spec.whole_shape})


def file_name(rank: int) -> str:
    """Return the name of a rank's data file."""
    return f"rank-{rank:05d}.safetensors"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor as row-major elements; a view of its memory where that is possible."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return octets(plain).numpy().data


def octets(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a row-major tensor as uint8 [bytes], a view."""
    # Not by `reshape`: where a dim has one element its stride may be any, and stays.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _header_entry(name: str, dtype: str, shape: Sequence[int], begin: int, end: int) -> str:
    dims = ",".join(map(str, shape))  # the encoder takes several times as long, and there may be many tensors
    return f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{begin},{end}]}}'


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
