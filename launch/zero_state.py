"""A ZeRO engine's state under the names and shapes that any engine's checkpoint has: saved by one, resumed by any.

Weights are the optimizer's own, in fp32, also where the model computes in bf16. They and the moments are copied in the
background, as they lie in DeepSpeed's flat partitions; a load reads whole tensors on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpointing import Mutability
from launch.flat import flatten, unflatten
from launch.held import mismatch, unknown
from launch.optim_state import CLASS, GROUPS, check_groups
from launch.partial import WholeModel, tensors_of
from launch.rows import RowExchange, provider_of
from launch.zero_parts import Part, fill_parameter, parts_of


class ZeroState:
    """`launch.held.Held` of model and optimizer. Every rank makes one: a collective."""

    def __init__(self, engine: Any, whole: WholeModel, group: torch.distributed.ProcessGroup) -> None:
        self._engine, self._whole, self._group = engine, whole, group
        self.parts: Sequence[Part] = parts_of(engine, whole.shapes)
        self._sharded = self._names()
        self._exchange = RowExchange({part.name: part.held for part in self.parts}, group)

    @property
    def _base(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer

    def state(self) -> dict[str, Any]:
        """See `Held.state`; ranks exchange the rows that their ranges cut through."""
        slots = self._slot_names()
        mine = {part.name: self._values(part, slots) for part in self.parts}
        tails = self._exchange.tails(
            {
                name: mine.get(name) or [torch.empty(0, dtype=dtype)] * (1 + len(slots) * (name in self._whole.trained))
                for name, dtype in self._sharded.items()
            }
        )
        flat: dict[str, Any] = {f"model.{name}": tensor for name, tensor in self._plain().items()}
        for part in self.parts:
            kept = Mutability.STEP if part.trained else Mutability.NEVER
            if part.held.last > part.held.first:
                names = [f"model.{part.name}", *(f"optim.{part.name}.{slot}" for slot in slots if part.trained)]
                for name, live, tail in zip(names, mine[part.name], tails[part.name], strict=True):
                    flat[name] = provider_of(part.held, live, tail, kept)
            if part.trained and slots:
                flat[f"optim.{part.name}.step"] = self._base.state[part.flat]["step"]
        flat[CLASS] = type(self._base).__name__
        flatten(GROUPS, self._settings(), flat)
        return flat

    def check(self, flat: Mapping[str, Any]) -> Iterator[str]:
        """See `Held.check`."""
        plain = self._plain()
        for name, shape in self._whole.shapes.items():
            dtype = self._sharded[name] if name in self._sharded else plain[name].dtype
            yield from mismatch(f"model.{name}", flat, shape, dtype)
        yield from unknown(flat, {f"model.{name}" for name in self._whole.shapes})
        yield from check_groups(flat, type(self._base).__name__, self._settings())
        for name, value in flat.items():
            of = name.removeprefix("optim.").rpartition(".")[0]
            if not name.startswith("optim.") or not isinstance(value, Tensor):
                continue
            if of not in self._whole.trained:
                yield f"{name} is of a parameter that the model does not have"
            elif value.dim() and tuple(value.shape) != self._whole.shapes[of]:
                yield f"{name} was {list(value.shape)} and is {list(self._whole.shapes[of])}"

    @torch.no_grad()
    def load(self, flat: Mapping[str, Any]) -> None:
        """See `Held.load`."""
        for name, tensor in self._plain().items():
            tensor.copy_(flat[f"model.{name}"])
        for name, parameter in self._engine.module.named_parameters():
            if name in self._sharded:
                fill_parameter(parameter, flat[f"model.{name}"])
        self._base.state.clear()
        saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in flat.items():
            of, _, slot = name.removeprefix("optim.").rpartition(".")
            if name.startswith("optim.") and isinstance(value, Tensor):
                saved[of][slot] = value
        for part in self.parts:
            begin, end = part.held.start, part.held.stop
            part.of(part.flat).copy_(flat[f"model.{part.name}"].reshape(-1)[begin:end])
            for slot, value in saved[part.name].items():
                self._load_slot(part, slot, value)
        for group, settings in zip(self._base.param_groups, unflatten(GROUPS, flat), strict=True):
            for key, value in settings.items():
                if key != "params":
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value

    def _load_slot(self, part: Part, slot: str, value: Tensor) -> None:
        slots = self._base.state[part.flat]
        if not value.dim():
            slots[slot] = value.detach().clone()
            return
        if slot not in slots:
            slots[slot] = torch.zeros_like(part.flat, dtype=value.dtype)
        part.of(slots[slot]).copy_(value.reshape(-1)[part.held.start : part.held.stop])

    def _names(self) -> dict[str, torch.dtype]:
        """Return what ranks hold ranges of, with the dtype they hold it in, in the model's order."""
        every: list[dict[str, torch.dtype]] = [{}] * torch.distributed.get_world_size(self._group)
        mine = {part.name: part.flat.dtype for part in self.parts}
        torch.distributed.all_gather_object(every, mine, group=self._group)
        known = {name: dtype for one in every for name, dtype in one.items()}
        return {name: known[name] for name in self._whole.shapes if name in known}

    def _plain(self) -> dict[str, Tensor]:
        """Return what is whole on every rank: buffers, and in stages 1 and 2 frozen parameters."""
        return {name: tensor for name, tensor in tensors_of(self._engine.module).items() if name not in self._sharded}

    def _slot_names(self) -> list[str]:
        """Return the names of the moments, of all ranks: one may hold nothing. None before the first step."""
        found = [self._base.state.get(part.flat, {}) for part in self.parts if part.trained]
        mine = {slot for slots in found for slot, value in slots.items() if isinstance(value, Tensor) and value.dim()}
        every: list[set[str]] = [set()] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(every, mine, group=self._group)
        return sorted(set().union(*every))

    def _values(self, part: Part, slots: Sequence[str]) -> list[Tensor]:
        kept = [self._base.state[part.flat][slot] for slot in slots] if part.trained else []
        return [part.of(one) for one in (part.flat, *kept)]

    def _settings(self) -> list[dict[str, Any]]:
        """Return the settings of the optimizer's groups, with all their parameters by name."""
        groups = zip(self._base.param_groups, self._whole.groups(), strict=True)
        return [{**group, "params": list(names)} for group, names in groups]
