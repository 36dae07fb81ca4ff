"""Hashes of tensors, by which ranks and files are compared."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor


def print_of(*values: Tensor) -> str:
    """Return the xxh3-128 of the elements of tensors, row-major, one after the other; strides do not matter."""
    digest = xxhash.xxh3_128()
    for value in values:
        flat = value.detach().cpu().contiguous()
        # Not by `reshape`: of one element any stride counts as contiguous, and stays, and is no view of bytes.
        digest.update(flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data)
    return digest.hexdigest()
