"""Where DeepSpeed keeps the parameters of a ZeRO engine: the range of each that this rank steps, and in which memory.

`flat` is what the optimizer steps: a partition of all parameters of a group, in fp32. Read from what DeepSpeed keeps
for its own checkpoints (`_hp_mapping` in stages 1 and 2, `grad_position` in stage 3), at version 0.19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.rows import Range


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's range of one parameter."""

    name: str
    held: Range
    flat: Tensor
    """Fp32, 1-D; of a frozen parameter of stage 3, its own partition."""
    at: int
    """Where the range begins in it."""
    trained: bool

    def of(self, flat: Tensor) -> Tensor:
        """Return this range's elements of `flat`, or of a slot as long as that; no copy."""
        return flat.detach().narrow(0, self.at, self.held.size)


def parts_of(engine: Any, shapes: dict[str, tuple[int, ...]]) -> list[Part]:
    """Return the ranges that this rank holds, in the model's order; `shapes` are those of the whole parameters."""
    found = []
    for name, parameter in engine.module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        part = _of_stage_3(engine, name, parameter, shapes[name]) if sharded else _of_stage_12(engine, name, parameter)
        if part is not None and part.held.size:
            found.append(part)
    return found


def _of_stage_12(engine: Any, name: str, parameter: nn.Parameter) -> Part | None:
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if not parameter.requires_grad or mapping is None:
        return None
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    held = Range(tuple(parameter.shape), mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
    return Part(name, held, flat, mapping.hp_fragment_address.start, trained=True)


def _of_stage_3(engine: Any, name: str, parameter: Any, shape: tuple[int, ...]) -> Part:
    rank, each = torch.distributed.get_rank(parameter.ds_process_group), int(parameter.partition_numel())
    start = min(rank * each, parameter.ds_numel)
    held = Range(shape, start, min(each, parameter.ds_numel - start))
    if not parameter.requires_grad:
        return Part(name, held, parameter.ds_tensor, 0, trained=False)
    optimizer = engine.optimizer
    group, at, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return Part(name, held, optimizer.fp32_partitioned_groups_flat[group], at, trained=True)


@torch.no_grad()
def fill_parameter(parameter: Any, whole: Tensor) -> None:
    """Put a whole value where the forward reads it; the optimizer's own copy is another."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(whole)
        return
    rank, each = torch.distributed.get_rank(parameter.ds_process_group), int(parameter.partition_numel())
    start = min(rank * each, parameter.ds_numel)
    size = min(each, parameter.ds_numel - start)
    parameter.ds_tensor.data.narrow(0, 0, size).copy_(whole.reshape(-1)[start : start + size])
    if parameter.data.shape == whole.shape:  # small ones stay gathered
        parameter.data.copy_(whole)
