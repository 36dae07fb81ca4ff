"""What a rank needs of a checkpoint: the saved names under its prefixes, sharded as its live state is now.

A name whose live tensor is a DTensor is wanted as this rank's shard, and given as a DTensor like the live one. A saved
`optim.<parameter>.<slot>` that is not live yet (no step was taken) is sharded like the parameter, if it has its shape.
Everything else is wanted whole, and by all: a rank that gives out only what it steps may compute with more.

A state that says `restores_own_names = True` is brought less: a tensor that it has not, and the same state of another
rank has, is that rank's. One that is live nowhere yet goes to where its parameter is, or else to all, as values do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpointing.errors import CheckpointError
from checkpointing.objects import load_object
from checkpointing.providers.tensors import TensorProvider
from checkpointing.records import Manifest, Stateful
from checkpointing.reshard import Box, whole


@dataclass(frozen=True, slots=True)
class Live:
    """What a rank holds, as the other ranks need to know it."""

    prefixes: tuple[str, ...]
    choosy: tuple[str, ...]
    """Those of them whose states are brought their own names only."""
    names: frozenset[str]
    """Global names that the states of these give out."""
    shards: Mapping[str, tuple[tuple[int, ...], Box]]
    """Global name of a DTensor to its global shape and the box this rank holds."""

    def to_json(self) -> dict[str, Any]:
        """Return it as it travels."""
        shards = {name: [shape, box.offset, box.shape] for name, (shape, box) in self.shards.items()}
        return {
            "prefixes": self.prefixes, "choosy": self.choosy, "names": sorted(self.names), "shards": shards,
        }  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Live:
        """Return what `to_json` gave."""
        shards = {
            name: (tuple(shape), Box(tuple(offset), tuple(local)))
            for name, (shape, offset, local) in body["shards"].items()
        }
        return cls(tuple(body["prefixes"]), tuple(body["choosy"]), frozenset(body["names"]), shards)


@dataclass(frozen=True, slots=True)
class Need:
    """What one rank wants, and how to make of it what its state is given."""

    boxes: Mapping[str, Box]
    """By saved name: an alias is wanted as the name it was written under."""
    names: tuple[str, ...]
    """Names that are given, aliases and values included."""
    like: Mapping[str, str]
    """Names that are given as a DTensor, to the name of the live one they are like."""


def live_state(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Return the live state by global name."""
    found = {}
    for prefix, part in parts.items():
        state = getattr(part, "state_providers", part.state_dict)()
        for name, value in state.items() if isinstance(state, Mapping) else ():
            found[f"{prefix}.{name}" if prefix else name] = value
    return found


def shards_of(state: Mapping[str, Any]) -> dict[str, DTensor]:
    """Return the DTensors of a live state."""
    bare = ((name, value.tensor if isinstance(value, TensorProvider) else value) for name, value in state.items())
    return {name: value for name, value in bare if isinstance(value, DTensor)}


def live_of(parts: Mapping[str, Stateful], state: Mapping[str, Any], shards: Mapping[str, DTensor]) -> Live:
    """Return what this rank tells the others of its parts; `state` is what they give out."""
    boxes = {name: (tuple(one.shape), local_box(one)) for name, one in shards.items()}
    choosy = tuple(prefix for prefix, part in parts.items() if getattr(part, "restores_own_names", False))
    return Live(tuple(parts), choosy, frozenset(_under(state, choosy)), boxes)


def need_of(manifest: Manifest, live: Live, somewhere: Set[str]) -> Need:
    """Return what a rank needs; `somewhere` are the names that choosy states have on any rank.

    Raises CheckpointError when a live shard is of another shape than what was saved.
    """
    shapes = {entry.name: entry.global_shape for entry in manifest.tensors}
    aliases = manifest.aliases
    names = [*_under((*shapes, *aliases, *manifest.values), live.prefixes)]
    if live.choosy:
        own, others = live.names, somewhere - live.names
        chosen = {*_under(names, live.choosy)} - manifest.values.keys() - own
        left = chosen & others | {name for name in chosen - others if not _is_its(name, own, others)}
        names = [name for name in names if name not in left]
    wholes = {shape: whole(shape) for shape in {*shapes.values()}}
    like: dict[str, str] = {}
    boxes: dict[str, Box] = {}
    for name in names:
        saved = aliases.get(name, name)
        if saved not in shapes:
            continue
        box = wholes[shapes[saved]]
        if live.shards and saved not in manifest.objects:
            box = _held(name, shapes[saved], live, like) or box
        # Two names of one tensor that are sharded differently: the whole serves both.
        boxes[saved] = box if boxes.get(saved, box) == box else wholes[shapes[saved]]
    return Need(boxes, tuple(names), like)


def _held(name: str, shape: tuple[int, ...], live: Live, like: dict[str, str]) -> Box | None:
    """Return what a rank holds of a tensor when it is sharded, and note what it is sharded like."""
    model = name if name in live.shards else _parameter_of(name)
    if model not in live.shards:
        return None
    now, held = live.shards[model]
    if now == shape:
        like[name] = model
        return held
    if model == name:
        raise CheckpointError(f"{name!r} was saved as {list(shape)} and is {list(now)} now")
    return None


def _under(names: Iterable[str], prefixes: Sequence[str]) -> Iterable[str]:
    if "" in prefixes:
        return names
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return [name for name in names if name.startswith(starts)]


def _is_its(name: str, own: Set[str], others: Set[str]) -> bool:
    """Return whether a name that is live nowhere is a rank's: where its parameter is, or else everybody's."""
    model = _parameter_of(name)
    return model in own or model not in others


def local_box(tensor: DTensor) -> Box:
    """Return the box this rank holds; all of the tensor where that is not one box, or nothing."""
    if tensor.device_mesh.get_coordinate() is None or any(place.is_partial() for place in tensor.placements):
        return whole(tuple(tensor.shape))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(tensor._local_tensor.shape):  # placements that torch cannot tell the place of
        return whole(tuple(tensor.shape))
    return Box(tuple(offset), tuple(shape)) if all(shape) else Box((0,) * len(shape), tuple(shape))


def given(
    manifest: Manifest, need: Need, loaded: Mapping[str, torch.Tensor], shards: Mapping[str, DTensor]
) -> dict[str, Any]:
    """Return {name: what the state is given}: tensors, DTensors, objects and values."""
    out: dict[str, Any] = {}
    for name in need.names:
        saved = manifest.aliases.get(name, name)
        if saved in manifest.objects:
            out[name] = load_object(saved, loaded[saved].numpy().data)
        elif saved in loaded:
            out[name] = _sharded(loaded[saved], shards[need.like[name]]) if name in need.like else loaded[saved]
        else:
            out[name] = manifest.values[name]
    return out


def _sharded(tensor: torch.Tensor, live: DTensor) -> DTensor:
    tensor = tensor.to(live.to_local().device)
    if tuple(live._local_tensor.shape) != tuple(tensor.shape):  # it came whole
        return distribute_tensor(tensor, live.device_mesh, live.placements, src_data_rank=None)
    return DTensor.from_local(
        tensor, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=_row_major(live.shape)
    )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(max(dim, 1) for dim in shape[at + 1 :]) for at in range(len(shape)))


def _parameter_of(name: str) -> str:
    """Return the name of the parameter that an `optim.<parameter>.<slot>` is of; "" when it is none."""
    at = name.find("optim.")
    if at < 0 or (at and name[at - 1] != "."):
        return ""
    return f"{name[:at]}model.{name[at + len('optim.') :].rpartition('.')[0]}"
