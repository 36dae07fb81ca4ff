"""Activation checkpointing inside a chunk: a decoder layer keeps its input and runs a second time in backward.

Layers write the same keys and values at the same offsets again, and dropout is replayed, so gradients do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from chunkflow.engine import forward_as
from chunkflow.errors import ChunkflowError


class LayerCheckpoints:
    """Switches checkpointing of these layers on and off; raises ChunkflowError where the model's own is on."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        # Made once: a compiled layer would be compiled anew for another forward.
        self._forwards = [(layer, partial(_checkpointed, layer.forward)) for layer in layers]
        if any(getattr(layer, "gradient_checkpointing", False) for layer, _ in self._forwards):
            raise ChunkflowError(
                "checkpoint_layers is on and so is the model's own activation checkpointing; use one of them"
            )

    @contextmanager
    def on(self) -> Iterator[None]:
        """Checkpoint the layers."""
        with ExitStack() as stack:
            for layer, forward in self._forwards:
                stack.enter_context(forward_as(layer, forward))
            yield


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
