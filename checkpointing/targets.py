"""Live memory that a restore may fill as it reads: then there is no second copy of a state, nor a copy behind it.

Only verified bytes go there. A restore that fails has perhaps filled some of it; `Checkpointer` saves nothing then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from checkpointing.providers.tensors import TensorProvider

LEAST_BYTES = 256 * 2**10
"""Of smaller ones all are read before any is given, and a state may compare them with its own."""


def targets_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return, by name, the tensors of a live state that can be filled where they lie.

    Those that are large, row-major, in host memory, and share none of it with another tensor of the state.
    """
    tensors = {name: tensor for name, value in state.items() if (tensor := _local(value)) is not None}
    alone = _alone(tensors)
    return {name: tensor for name, tensor in tensors.items() if name in alone and _is_plain(tensor)}


def _local(value: Any) -> torch.Tensor | None:
    """Return the memory behind a value of a state, if that is a tensor on the host."""
    value = value.tensor if isinstance(value, TensorProvider) else value
    value = value._local_tensor if isinstance(value, DTensor) else value
    is_tensor = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return value.detach() if is_tensor and value.device.type == "cpu" else None


def _is_plain(tensor: torch.Tensor) -> bool:
    bits = tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    return tensor.nbytes >= LEAST_BYTES and tensor.is_contiguous() and not bits


def _alone(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of tensors whose memory no other one reaches into."""
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    alone, reached = set[str](), 0
    for at, (begin, end, name) in enumerate(spans):
        following = spans[at + 1][0] if at + 1 < len(spans) else end
        if begin >= reached and following >= end:
            alone.add(name)
        reached = max(reached, end)
    return alone


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return from which to which address a tensor may reach."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
