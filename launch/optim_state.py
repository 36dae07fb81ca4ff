"""Any torch optimizer's state by parameter name instead of by number: `optim.<parameter name>.<slot>`.

torch's own `state_dict` numbers the parameters, from which nothing can be resharded, and its `load_state_dict` casts
every slot to the parameter's dtype, which would cut fp32 moments of bf16 parameters down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from launch.errors import ResumeError
from launch.flat import flatten, roots, unflatten

GROUPS = "optim_groups"
CLASS = "optim_class"


class NamedOptimizer:
    """An optimizer together with the names of its parameters.

    `groups`, where a rank holds a part of the model, are the names in each group as they would be for the whole of it:
    what is saved says the same on every rank, and does not depend on the cut.
    """

    def __init__(
        self, optimizer: Optimizer, names: Mapping[Tensor, str], *, groups: Sequence[Sequence[str]] | None = None
    ) -> None:
        self.optimizer = optimizer
        if groups is not None and len(groups) != len(optimizer.param_groups):
            raise ResumeError(
                f"the optimizer has {len(optimizer.param_groups)} parameter groups, and the whole model's {len(groups)}"
            )
        self._groups = None if groups is None else [list(group) for group in groups]
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param not in names:
                    raise ResumeError(
                        f"the optimizer has a parameter of shape {list(param.shape)} that is not the model's; make it "
                        "from model.parameters()"
                    )
        self._names = names

    def state(self) -> dict[str, Any]:
        """Return the state, flat; also before the first step, when most optimizers have none."""
        flat: dict[str, Any] = {CLASS: type(self.optimizer).__name__}
        flatten(GROUPS, self._all_settings(), flat)
        for param, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                flatten(f"optim.{self._names[param]}.{slot}", value, flat)
        return flat

    def check(self, flat: Mapping[str, Any]) -> Iterator[str]:
        """Yield what keeps a saved state from being this optimizer's; changes nothing."""
        yield from check_groups(flat, type(self.optimizer).__name__, self._all_settings())
        if CLASS not in flat or GROUPS not in flat:
            return
        live, elsewhere = {name: param for param, name in self._names.items()}, self._elsewhere()
        for name, slot in self._slots(flat):
            if name in elsewhere:
                continue
            if name not in live:
                yield f"optim.{name}.{slot} is of a parameter that the model does not have"
                continue
            before, after = flat[f"optim.{name}.{slot}"], self.optimizer.state.get(live[name], {}).get(slot)
            if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape != after.shape:
                yield f"optim.{name}.{slot} was {list(before.shape)} and is {list(after.shape)}"

    def load(self, flat: Mapping[str, Any]) -> None:
        """Take over a state that `check` found nothing against."""
        for group, saved in zip(self.optimizer.param_groups, unflatten(GROUPS, flat), strict=True):
            for key, value in saved.items():
                if key != "params":
                    group[key] = _like(value, group.get(key))
        live = {name: param for param, name in self._names.items()}
        capturable = {
            id(param): bool(group.get("capturable") or group.get("fused"))
            for group in self.optimizer.param_groups
            for param in group["params"]
        }
        self.optimizer.state.clear()
        for name, slot in self._slots(flat):
            if name not in live:  # another rank's
                continue
            param = live[name]
            # As torch does it: the step count stays on the CPU unless the kernel reads it.
            stays = slot == "step" and not capturable.get(id(param))
            value = unflatten(f"optim.{name}.{slot}", flat)
            self.optimizer.state[param][slot] = _copied(value, None if stays else param.device)

    def _all_settings(self) -> list[dict[str, Any]]:
        """Return the settings of every group, with its parameters by name."""
        groups = self.optimizer.param_groups
        names = self._groups or [[self._names[param] for param in group["params"]] for group in groups]
        return [{**group, "params": members} for group, members in zip(groups, names, strict=True)]

    def _elsewhere(self) -> set[str]:
        """Return the parameters of the whole model that this rank does not hold."""
        return {name for group in self._groups or () for name in group} - set(self._names.values())

    def _slots(self, flat: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (parameter name, slot) of every saved slot, not of the members of an expanded one."""
        names = {*self._names.values(), *self._elsewhere()}
        for key in roots(flat):
            if not key.startswith("optim."):
                continue
            name, _, slot = key.removeprefix("optim.").rpartition(".")
            outer, inner = name, slot
            while outer and outer not in names:  # a slot's own name may have dots, as a parameter's has
                outer, _, part = outer.rpartition(".")
                inner = f"{part}.{inner}"
            yield (outer, inner) if outer else (name, slot)


def check_groups(flat: Mapping[str, Any], kind: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what keeps saved settings from being those of an optimizer of this class and these groups."""
    if CLASS not in flat or GROUPS not in flat:
        yield f"{GROUPS} is missing"
        return
    if flat[CLASS] != kind:
        yield f"the optimizer was {flat[CLASS]} and is {kind}"
    saved = unflatten(GROUPS, flat)
    if [group["params"] for group in saved] != [group["params"] for group in groups]:
        yield (
            f"the optimizer's parameter groups were of {[len(group['params']) for group in saved]} parameters and "
            f"are of {[len(group['params']) for group in groups]}, or of others"
        )


def _copied(value: Any, device: torch.device | None) -> Any:
    """Return a copy of its own of every tensor inside, with the dtype it was saved in."""
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    if isinstance(value, list | tuple):
        return type(value)(_copied(member, device) for member in value)
    return {key: _copied(member, device) for key, member in value.items()} if isinstance(value, dict) else value


def _like(value: Any, live: Any) -> Any:
    """Return a saved setting in the type that the optimizer uses: JSON has no tuples."""
    if isinstance(live, Tensor) and isinstance(value, Tensor):
        return value.detach().to(live.device, live.dtype, copy=True)
    return tuple(value) if isinstance(live, tuple) else value
