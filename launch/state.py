"""`TrainState`: everything a job needs to go on bit by bit, as one flat `Stateful`.

model.<name>                  parameters and persistent buffers, tied ones once
optim.<parameter name>.<slot> optimizer state;  optim_groups, optim_class  its settings
loader                        where the loader stands
rng.<rank>.<generator>        every rank's random number generators
parts.<name>                  what else has a state: a scheduler, a gradient scaler
progress                      {"step": optimizer steps done}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from checkpointing import Mutability, TensorProvider
from chunkflow.world import resolve_place
from launch.errors import ResumeError
from launch.flat import flatten, unflatten
from launch.held import Held, ModelTensors
from launch.optim_state import NamedOptimizer
from launch.partial import WholeModel
from launch.rng import rng_state, seed_rngs, set_rng_state

_SHOWN = 3


class Position(Protocol):
    """What a TrainState needs of a loader."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position, or raise and stay."""
        ...


class _Nowhere:
    """The position of a job whose data has none."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take whatever there is."""


class Part(Protocol):
    """Something else of a job with a state: tensors, numbers, strings, lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take it over."""
        ...


def _bare(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel and `torch.compile`, which put a name before its own."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


class Spread(Protocol):
    """How tensors of which this rank holds a part are told from whole ones in a checkpoint."""

    def to_global(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state with every part as a DTensor of the whole. Every rank calls."""
        ...

    def to_local(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return a saved state cut to what this rank holds; raise where it does not fit."""
        ...


class TrainState:
    """The state of one rank of a job. `step` is the number of optimizer steps done; the loop counts it up.

    The optimizer may be any of torch's; it must be made from the model's parameters. A model in DistributedDataParallel
    or `torch.compile` is saved by its own names, so that it loads with or without them. Without a `loader` there is no
    position in the data to keep. `rank` and `world_size` default to
    those of the default process group, or to one process where there is none. `whole` describes the model of which
    `model` is this rank's part: a checkpoint then has the names of the whole, whatever the cut, and loads into any.
    `parts` are what else belongs to the job, by name: a learning-rate scheduler, a GradScaler. `spread` is for models
    with parameters of which every rank holds a part, as experts; `held`, for engines that keep model and optimizer in a
    way of their own, takes the place of both.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        loader: Position | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
        whole: WholeModel | None = None,
        parts: Mapping[str, Part] | None = None,
        spread: Spread | None = None,
        held: Sequence[Held] | None = None,
    ) -> None:
        self.step = 0
        self.notes: tuple[str, ...] = ()
        """What the last load_state_dict could not restore, in words."""
        model = _bare(model)
        self._model, self._parts, self._spread = model, dict(parts or {}), spread
        self._loader: Position = _Nowhere() if loader is None else loader
        self._rank, self._world_size = resolve_place(rank, world_size)
        self._seed = seed
        self._device = device or torch.device("cpu")
        self._held: Sequence[Held] = held or ()
        if held is None:
            assert optimizer is not None
            names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
            groups = None if whole is None else whole.groups()
            self._held = (ModelTensors(model, whole=whole), NamedOptimizer(optimizer, names, groups=groups))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, flat. The tensors are the live ones, not copies."""
        parts: dict[str, Any] = {}
        for name, part in self._parts.items():
            flatten(f"parts.{name}", part.state_dict(), parts)
        flat = {
            **{name: value for one in self._held for name, value in one.state().items()},
            **parts,
            "loader": self._loader.state_dict(),
            **{f"rng.{self._rank}.{name}": value for name, value in rng_state(self._device).items()},
            "progress": {"step": self.step},
        }
        return flat if self._spread is None else self._spread.to_global(flat)

    def state_providers(self) -> dict[str, Any]:
        """Return the state as `state_dict` does, and say which of it never changes: parameters that are not trained.

        What an optimizer steps the checkpointer finds out by itself.
        """
        frozen = {f"model.{name}" for name, param in self._model.named_parameters() if not param.requires_grad}
        state = self.state_dict()
        plain = {name: state[name] for name in frozen if isinstance(state.get(name), Tensor)}
        return state | {name: TensorProvider(tensor, Mutability.NEVER) for name, tensor in plain.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state: all names of all ranks.

        Raises ResumeError naming the first differences when it is not of this model and optimizer, and whatever the
        loader raises when it is of other data; nothing has been changed then.
        """
        flat = state_dict if self._spread is None else self._spread.to_local(state_dict)
        problems = [problem for one in self._held for problem in one.check(flat)]
        problems += [f"{name} is missing" for name in self._needed() if name not in flat]
        if problems:
            more = f", and {len(problems) - _SHOWN} more differences" if len(problems) > _SHOWN else ""
            raise ResumeError(
                f"the checkpoint is of another model or optimizer: {'; '.join(problems[:_SHOWN])}{more}. Use the "
                "settings it was made with, another run.folder, or start over with --fresh true"
            )
        self._loader.load_state_dict(flat["loader"])
        for one in self._held:
            one.load(flat)
        for name, part in self._parts.items():
            part.load_state_dict(unflatten(f"parts.{name}", flat))
        self.step = int(flat["progress"]["step"])
        self._load_rngs(flat)

    def _needed(self) -> list[str]:
        return ["loader", "progress", *(f"parts.{name}" for name in self._parts)]

    def _load_rngs(self, flat: Mapping[str, Any]) -> None:
        saved = {int(name.split(".")[1]) for name in flat if name.startswith("rng.")}
        missing = sorted(set(range(self._world_size)) - saved)
        self.notes = ()
        if missing:
            self.notes = (
                f"saved by {len(saved)} ranks: the random numbers of ranks {missing} start from the seed and the step",
            )
        prefix = f"rng.{self._rank}."
        mine = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
        if mine:
            set_rng_state(mine, self._device)
        else:
            seed_rngs(((self._seed * 1_000_003 + self.step) * 65_537 + self._rank) % 2**63)
