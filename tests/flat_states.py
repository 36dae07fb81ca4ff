"""States for the checkpointing tests: flat, with everything that can be saved; and their comparison, bit by bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from checkpointing.formats import Source, open_source


class Flat:
    """A Stateful that gives out a dict, and keeps what it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict


def assorted(seed: int = 0) -> dict[str, Any]:
    """Return tensors of every awkward kind, and values."""
    torch.manual_seed(seed)
    weight = torch.randn(8, 5)
    return {
        "weight": weight,
        "head.weight": weight,
        "bf16": torch.randn(33).bfloat16(),
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 7),
        "turned": torch.randn(6, 4).t(),
        "strided": torch.arange(40)[::3],
        "expanded": torch.tensor([1.5]).expand(4),
        "page": torch.randn(1024),
        "odd": torch.randint(0, 255, (13,), dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "seed": seed,
        "progress": {"loss": [math.nan, math.inf, -math.inf, -0.0, 1e-320], "$note": "é\ud800", "none": None},
    }


def same(left: Any, right: Any) -> bool:
    """Return whether two states are equal: types, dtypes, shapes and every bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and torch.equal(_bytes(left), _bytes(right))
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and repr(left) == repr(right)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8)


def read_source(path: Path, step: int | None = None) -> tuple[Source, dict[str, torch.Tensor]]:
    """Open a checkpoint of any format; return it, and all of its tensors, which are what it said they are."""
    source = open_source(path, step=step)
    tensors = {name: lazy.read() for name, lazy in source.tensors.items()}
    for name, lazy in source.tensors.items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (lazy.dtype, lazy.shape)
    return source, tensors
