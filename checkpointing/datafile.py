"""One rank's data file: a valid .safetensors file (8-byte length, JSON header, bytes). Pure.

The header is padded with spaces to whole pages, so that the bytes begin on a page and any aligned writer can be used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from checkpointing.dtypes import shape_in_file
from checkpointing.errors import SaveError
from checkpointing.records import TensorSpec
from checkpointing.torch_dtypes import DTYPES

_PAGE = 4096
_MAX_HEADER = 100_000_000  # what the safetensors library accepts


@dataclass(frozen=True, slots=True)
class DataLayout:
    """The first bytes of a file, and where its tensors lie behind them."""

    head: bytes
    """Everything before the first tensor: length field, header, padding."""
    ranges: tuple[tuple[int, int], ...]
    """(begin, end) of each tensor in the file, in order, without gaps."""

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self.ranges[-1][1] if self.ranges else len(self.head)


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> DataLayout:
    """Lay `specs` out in the given order. Raises SaveError when the header grows beyond what readers accept."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    ends = [0]
    for spec in specs:
        ends.append(ends[-1] + spec.num_bytes)
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(shape_in_file(spec.dtype, spec.shape)),
            "data_offsets": ends[-2:],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    if len(text) > _MAX_HEADER:
        raise SaveError(
            f"{len(specs)} tensors make a header of {len(text)} bytes; {_MAX_HEADER} is the limit: save fewer tensors "
            "per rank, or larger ones"
        )
    start = 8 + len(text)
    pairs = pairwise(ends)
    return DataLayout(len(text).to_bytes(8, "little") + text, tuple((start + a, start + b) for a, b in pairs))


def file_name(rank: int) -> str:
    """Return the name of a rank's data file."""
    return f"rank-{rank:05d}.safetensors"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor as row-major elements; a view of its memory where that is possible."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def empty_tensor(dtype: str, shape: Sequence[int]) -> tuple[torch.Tensor, memoryview]:
    """Return a new tensor and the bytes of its memory, to be filled."""
    tensor = torch.empty(tuple(shape), dtype=DTYPES[dtype])
    return tensor, bytes_of(tensor)
