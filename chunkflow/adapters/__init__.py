"""Wrappers around models, and trainers that are not ours: one file each, imported only when used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from chunkflow.engine import Engine, WholeParameters
from chunkflow.errors import ChunkflowError


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model without its wrappers, and what they mean for training."""

    model: Any
    group: dist.ProcessGroup | str | None
    engine: Callable[[dist.ProcessGroup | None], Engine]


def unwrap(model: nn.Module, group: dist.ProcessGroup | str | None) -> Wrapped:
    """Look through DDP, FSDP2, DeepSpeed and PEFT. `group`, when given, is what the caller wants."""
    kind = type(model)
    if hasattr(model, "_orig_mod"):
        raise ChunkflowError(
            "the model is wrapped by torch.compile; give the model itself and compile its layers in place, behind the "
            "runner: for layer in model.model.layers: layer.compile()"
        )
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module, model.process_group if group is None else group)
    if any(base.__module__.startswith("deepspeed.") for base in kind.__mro__):
        return import_module("chunkflow.adapters.deepspeed").unwrap_deepspeed(model, group)
    engine: Callable[[dist.ProcessGroup | None], Engine] = WholeParameters
    if isinstance(model, FSDPModule):
        root = model
        engine = lambda ranks: import_module("chunkflow.adapters.fsdp2").Fsdp2(root, ranks)  # noqa: E731
    return Wrapped(without_peft(model), group, engine)


def without_peft(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model; any other as it is."""
    return import_module("chunkflow.adapters.peft").base_of(model) if _is_of_peft(model) else model


def plain_head(head: Any) -> Any:
    """Return the output projection that PEFT trains in place of this one; any other as it is."""
    return import_module("chunkflow.adapters.peft").trained_head(head) if _is_of_peft(head) else head


def _is_of_peft(module: Any) -> bool:
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)
