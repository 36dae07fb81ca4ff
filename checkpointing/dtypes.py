"""The dtypes a checkpoint holds, by their safetensors names. Without torch: listing and verifying need none of it."""

from __future__ import annotations

ITEMSIZES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F4": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element as torch counts them: an F4 element of torch is a pair, one byte."""


def itemsize(name: str) -> int:
    """Return the bytes of one element."""
    return ITEMSIZES[name]


def shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape as a .safetensors header states it, where F4 elements are counted one by one."""
    return (*shape[:-1], shape[-1] * 2) if name == "F4" else shape
