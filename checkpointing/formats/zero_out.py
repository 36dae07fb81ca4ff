"""A ZeRO stage 1 checkpoint, as DeepSpeed's engine loads it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from checkpointing.errors import FormatError
from checkpointing.formats.base import Source, Target, model_names, only_state
from checkpointing.nested import unflatten
from checkpointing.storage.local import LocalStorage


def write_zero(source: Source, target: Target) -> None:
    """Write `source`, a training state or a model, for `world_size` ranks. Raises FormatError when there is none."""
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    start, names = only_state(source), model_names(source)
    names = {name: own.removeprefix(start) for name, own in names.items()}
    source = source.below(start)
    flat = {name: lazy.read() for name, lazy in source.tensors.items()}
    extra = source.values.get("deepspeed")
    extra = unflatten(extra, flat.__getitem__) if extra else {}
    module = OrderedDict((name, flat[own]) for name, own in names.items() if own in flat)
    if not module:
        raise FormatError(f"{source.path} has no tensors of a model; a DeepSpeed checkpoint is of one")
    first = {own: name for name, own in names.items()}
    shared = {name: first[source.aliases[own]] for name, own in names.items() if own in source.aliases}
    groups, settings = _groups(source, extra, module)
    step = source.step if source.step is not None else int(extra.get("global_steps") or 0)
    folder = target.path / f"global_step{step}"
    storage = LocalStorage()
    storage.make_folders(folder)
    params = {name for group in groups for name in group}
    model_states = {
        "module": OrderedDict(module) | {one: module[other] for one, other in shared.items()},
        "buffer_names": [name for name in module if name not in params],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, module[name].shape) for name in group) for group in groups],
        "frozen_param_shapes": None,
        "shared_params": shared,
        "frozen_param_fragments": None,
        "lr_scheduler": extra.get("lr_scheduler"),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": int(extra.get("skipped_steps") or 0),
        "global_steps": step,
        "global_samples": int(extra.get("global_samples") or 0),
        "dp_world_size": target.world_size,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": deepspeed.__version__,
    }
    torch.save(model_states, folder / "mp_rank_00_model_states.pt")
    vectors = [_vectors(flat, module, group) for group in groups]
    for rank in range(target.world_size):
        parts = [_part(vector, rank, target.world_size) for vector in vectors]
        state = {
            "loss_scaler": LossScaler(scale=1),
            "dynamic_loss_scale": False,
            "overflow": False,
            "clip_grad": 0.0,
            "base_optimizer_state": {
                "state": {i: part["slots"] for i, part in enumerate(parts)},
                "param_groups": [{**one, "params": [i]} for i, one in enumerate(settings)],
            },
            "single_partition_of_fp32_groups": [part["fp32"] for part in parts],
            "zero_stage": ZeroStageEnum.optimizer_states,
            "group_paddings": [part["padding"] for part in parts],
            "partition_count": [target.world_size] * len(groups),
            "ds_version": deepspeed.__version__,
            "param_slice_mappings": [OrderedDict() for _ in groups],
        }
        low = any(module[name].dtype is torch.bfloat16 for name in params)
        name = f"{'bf16_' if low else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": deepspeed.__version__}, folder / name)
        target.wrote(sum(part["fp32"].numel() * 4 for part in parts))
    storage.write_new(target.path / "latest", f"{folder.name}".encode())


def _groups(source: Source, extra: dict[str, Any], module: dict[str, Any]) -> tuple[list[list[str]], list[Any]]:
    """Return the names and the settings of each parameter group."""
    if extra.get("groups"):
        return extra["groups"], extra.get("param_groups") or [{} for _ in extra["groups"]]
    saved = source.values.get("optim_groups")
    if isinstance(saved, list) and all(isinstance(one, dict) and "params" in one for one in saved):
        settings = [{key: _tuple(value) for key, value in one.items() if key != "params"} for one in saved]
        return [one["params"] for one in saved], settings
    slots = {name for name in source.tensors if name.startswith("optim.")}
    floating = [name for name, tensor in module.items() if tensor.is_floating_point()]
    trained = [name for name in floating if any(slot.startswith(f"optim.{name}.") for slot in slots)]
    return [trained or floating], [{}]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # betas; JSON has no tuples


def _vectors(flat: dict[str, Any], module: dict[str, Any], group: Sequence[str]) -> dict[str, Any]:
    """Return the vectors of a group: master weights and optimizer slots, each of all its parameters in a row."""
    fp32 = [flat.get(f"optim.{name}.fp32", module[name]).float().reshape(-1) for name in group]
    slots: dict[str, Any] = {}
    start = f"optim.{group[0]}." if group else "optim."
    for slot in [name[len(start) :] for name in flat if name.startswith(start)]:
        values = [flat[f"optim.{name}.{slot}"] for name in group if f"optim.{name}.{slot}" in flat]
        sized = all(value.numel() == prod(module[name].shape) for name, value in zip(group, values, strict=False))
        if slot != "fp32" and len(values) == len(group):
            scalar = values[0].numel() == 1 and slot == "step"
            if scalar or sized:
                slots[slot] = values[0] if scalar else torch.cat([value.reshape(-1) for value in values])
    return {"fp32": torch.cat(fp32) if fp32 else torch.empty(0), "slots": slots}


def _part(vector: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return a rank's part: slots padded to the common size, master weights without it, as DeepSpeed has it."""
    numel = vector["fp32"].numel()
    size = -(-numel // (2 * world_size)) * 2
    begin, end = min(rank * size, numel), min((rank + 1) * size, numel)

    def padded(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(value[begin:end], (0, size - (end - begin)))

    slots = {
        slot: padded(value) if value.numel() == numel and slot != "step" else value.clone()
        for slot, value in vector["slots"].items()
    }
    return {"fp32": vector["fp32"][begin:end].clone(), "slots": slots, "padding": size - (end - begin)}
