"""DeepSpeed ZeRO checkpoints, stages 1 to 3 in, stage 1 out. Reading needs no deepspeed and executes nothing.

    model.<name>              the module's weights (stage 3: the fp32 master weights) and buffers
    optim.<name>.fp32         master weights;  optim.<name>.<slot>  exp_avg, exp_avg_sq, step, ...
    deepspeed                 counters, parameter groups, scheduler

ZeRO 1 and 2 lay all parameters of a group in one vector and cut it into one part a rank; ZeRO 3 cuts each parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import FormatError, StateError
from checkpointing.formats.base import Lazy, Source, Target
from checkpointing.formats.torch_pt import load
from checkpointing.formats.zero_out import write_zero
from checkpointing.nested import flatten
from checkpointing.storage.local import LocalStorage


class _Plain:
    """Stands in for a class of DeepSpeed's: takes its fields, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_STAND_INS = [
    (_Plain, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]
_KEPT = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "dp_world_size", "ds_version")
_RANK = re.compile(r"zero_pp_rank_([0-9]+)_")


def read(path: Path, step: int | None) -> Source:
    """Open the folder of a tag, or the one above it (its `latest`, or `global_step<step>`). Raises FormatError."""
    folder = _tag_folder(path, step)
    models = _states(folder, "*_model_states.pt")
    if not models:
        raise FormatError(f"{folder} has no *_model_states.pt; give the folder of a DeepSpeed checkpoint")
    first = models[0]
    if "module" not in first or "param_shapes" not in first:
        raise FormatError(f"{folder}: its model states have no module or param_shapes; was it saved with ZeRO?")
    tensors = {
        f"model.{name}": Lazy.of(tensor) for name, tensor in first["module"].items() if isinstance(tensor, torch.Tensor)
    }
    optims = [one["optimizer_state_dict"] for one in _states(folder, "*_optim_states.pt")]
    groups = [dict(group) for group in first["param_shapes"]]
    names = [list(group) for group in groups]
    settings: list[Any] = []
    if optims:
        stage3 = "fp32_flat_groups" in optims[0]
        _check_count(folder, optims)
        merged, settings = _merged(folder, optims, groups, stage3)
        tensors |= {f"optim.{key}": Lazy.of(tensor) for key, tensor in merged.items()}
        if stage3:
            tensors |= {f"model.{name}": tensors[f"optim.{name}.fp32"] for group in names for name in group}
    kept = {key: first.get(key) for key in _KEPT} | {"groups": names, "param_groups": settings}
    try:
        found, encoded = flatten(kept, "deepspeed")
    except StateError as error:
        raise FormatError(f"{folder}: {error}") from error
    tensors |= {name: Lazy.of(tensor) for name, tensor in found.items()}
    aliases = {f"model.{one}": f"model.{other}" for one, other in (first.get("shared_params") or {}).items()}
    aliases = {one: other for one, other in aliases.items() if other in tensors}
    tensors = {name: lazy for name, lazy in tensors.items() if name not in aliases}
    return Source("deepspeed", folder, tensors, {"deepspeed": encoded}, first.get("global_steps"), aliases)


def write(source: Source, target: Target) -> None:
    """Write a ZeRO stage 1 checkpoint for `world_size` data-parallel ranks. Needs deepspeed."""
    write_zero(source, target)


def _tag_folder(path: Path, step: int | None) -> Path:
    if list(path.glob("*_model_states.pt")):
        return path
    if step is not None:
        return path / f"global_step{step}"
    try:
        tag = LocalStorage().read(path / "latest").decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} has no file `latest` that names a tag: {error}") from error
    if Path(tag).name != tag:
        raise FormatError(f"{path}/latest says {tag!r}, which is not a folder in it")
    return path / tag


def _states(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Return what the files hold, by data-parallel rank."""

    def rank(file: Path) -> int:
        match = _RANK.search(file.name)
        return int(match[1]) if match else 0

    files = [file for file in folder.glob(pattern) if not file.name.startswith(("layer_", "expert_"))]
    if any("mp_rank_00" not in file.name for file in files):
        raise FormatError(f"{folder} is of several model-parallel ranks; only data-parallel checkpoints are read")
    found = [load(file, _STAND_INS) for file in sorted(files, key=rank)]
    if not all(isinstance(one, dict) for one in found):
        raise FormatError(f"{folder}: a file of {pattern} holds no dict")
    return found


def _check_count(folder: Path, optims: Sequence[Mapping[str, Any]]) -> None:
    count = optims[0].get("partition_count")
    count = max(count) if isinstance(count, list) else count
    if count != len(optims):
        raise FormatError(f"{folder}: saved by {count} ranks, and {len(optims)} optimizer files are there")


def _merged(
    folder: Path, optims: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], stage3: bool
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Return ({`name.slot`: tensor}, settings of the parameter groups)."""
    merged: dict[str, torch.Tensor] = {}
    vectors = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
    inner = [one["optimizer_state_dict" if stage3 else "base_optimizer_state"] for one in optims]
    if not all(isinstance(one, dict) and "state" in one for one in inner):
        raise FormatError(f"{folder}: elastic optimizer states are not read; save with `elastic_checkpoint` off")
    for index, shapes in enumerate(groups):
        paddings = optims[0].get("param_alignment_paddings")
        gaps = paddings[index] if paddings else [0] * len(shapes)
        split = _split3 if stage3 else _split
        full = [torch.as_tensor(one[vectors][index]) for one in optims]
        merged |= {f"{name}.fp32": tensor for name, tensor in split(full, shapes, gaps)}
        states = [one["state"].get(index, {}) for one in inner]
        for slot, value in states[0].items():
            parts = [state[slot] for state in states]
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                merged |= {f"{name}.{slot}": tensor for name, tensor in split(parts, shapes, gaps)}
            else:
                merged |= {f"{name}.{slot}": torch.as_tensor(value).clone() for name in shapes}
    return merged, [{key: one for key, one in g.items() if key != "params"} for g in inner[0]["param_groups"]]


def _split(
    parts: Sequence[torch.Tensor], shapes: Mapping[str, Any], gaps: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    vector, at = torch.cat(list(parts)), 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        numel = prod(shape)
        if at + numel > vector.numel():
            raise FormatError(f"the vector of a parameter group has {vector.numel()} elements and ends before {name!r}")
        yield name, vector[at : at + numel].reshape(tuple(shape))
        at += numel + gap


def _split3(
    parts: Sequence[torch.Tensor], shapes: Mapping[str, Any], gaps: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    at = 0
    for name, shape in shapes.items():
        numel = prod(shape)
        size = -(-numel // len(parts))
        if at + size > min(part.numel() for part in parts):
            raise FormatError(f"a rank's vector ends before parameter {name!r}")
        yield name, torch.cat([part[at : at + size] for part in parts])[:numel].reshape(tuple(shape))
        at += size
