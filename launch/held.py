"""What of a job training changes, by name: the model's tensors here, the optimizer's in `optim_state`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from launch.partial import WholeModel, tensors_of


class Held(Protocol):
    """A part of a job's state: names to tensors, providers of their bytes, or JSON values."""

    def state(self) -> dict[str, Any]:
        """Return it, flat. Every rank calls."""
        ...

    def check(self, flat: Mapping[str, Any]) -> Iterator[str]:
        """Yield what keeps a saved state from being this one's; changes nothing."""
        ...

    def load(self, flat: Mapping[str, Any]) -> None:
        """Take over a state that `check` found nothing against. Every rank calls."""
        ...


class ModelTensors:
    """Parameters and persistent buffers as `model.<name>`, tied ones once.

    `whole` describes the model of which `model` is this rank's part.
    """

    def __init__(self, model: nn.Module, *, whole: WholeModel | None = None) -> None:
        self._model = model
        self._elsewhere = set() if whole is None else set(whole.shapes) - set(tensors_of(model))

    def state(self) -> dict[str, Any]:
        """See `Held.state`: the live tensors, not copies."""
        return {f"model.{name}": tensor for name, tensor in tensors_of(self._model).items()}

    def check(self, flat: Mapping[str, Any]) -> Iterator[str]:
        """See `Held.check`."""
        live = self.state()
        for name, tensor in live.items():
            yield from mismatch(name, flat, tensor.shape, tensor.dtype)
        yield from unknown(flat, live.keys() | {f"model.{name}" for name in self._elsewhere})

    @torch.no_grad()
    def load(self, flat: Mapping[str, Any]) -> None:
        """See `Held.load`."""
        for name, tensor in self.state().items():
            tensor.copy_(flat[name])


def mismatch(name: str, flat: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[str]:
    """Yield why a saved tensor is not one of this shape and dtype."""
    saved = flat.get(name)
    if not isinstance(saved, Tensor):
        yield f"{name} is not in it"
    elif tuple(saved.shape) != tuple(shape) or saved.dtype != dtype:
        yield f"{name} was {list(saved.shape)} of {saved.dtype} and is {list(shape)} of {dtype}"


def unknown(flat: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    """Yield the saved tensors of a model that this one does not have."""
    yield from (f"{name} is not in the model" for name in flat if name.startswith("model.") and name not in known)
