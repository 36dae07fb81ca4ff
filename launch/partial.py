"""The part of a model that one rank holds, under the names it has in the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from launch.split import Layer


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and persistent buffers by name, detached; of tied ones the first name only."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: tensor for name, tensor in state.items() if name not in every or first[every[name]] == name}


@dataclass(frozen=True, slots=True)
class WholeModel:
    """What every rank of a pipeline knows of the model that none of them holds."""

    shapes: dict[str, tuple[int, ...]]
    """Of parameters and persistent buffers by name, tied ones once, in the model's order."""
    trained: tuple[str, ...]
    """Parameters that are trained, in the model's order."""
    kind: str
    """The model's class."""
    num_parameters: int
    """Numbers in its parameters, tied ones once."""

    @staticmethod
    def of(model: nn.Module) -> WholeModel:
        """Describe a model."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
        trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        return WholeModel(shapes, trained, type(model).__name__, sum(p.numel() for p in model.parameters()))

    def groups_by_kind(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the trained matrices, and the trained norms and biases: the groups of `build_optimizer`."""
        matrices = tuple(name for name in self.trained if len(self.shapes[name]) >= 2)
        return matrices, tuple(name for name in self.trained if len(self.shapes[name]) < 2)

    def groups(self) -> list[tuple[str, ...]]:
        """Return the groups that have a parameter."""
        return [group for group in self.groups_by_kind() if group]


class PartialModel(nn.Module):
    """Holds the parameters and persistent buffers of some layers under their original names; it computes nothing.

    A tied weight has the first of its names, also where only its other use is held: what is saved from any cut of the
    model has the names of the whole.
    """

    def __init__(self, layers: Sequence[Layer], whole: WholeModel) -> None:
        held: dict[str, Tensor] = {}
        for layer in layers:
            held.update(zip(layer.param_names, dict.fromkeys(layer.module.parameters()), strict=True))
            buffers = dict(layer.module.named_buffers(prefix=layer.name))
            held.update({name: tensor for name, tensor in buffers.items() if name in whole.shapes})
        self._init(held, [layer.module for layer in layers], whole)

    @classmethod
    def of(cls, held: Mapping[str, Tensor], modules: Sequence[nn.Module], whole: WholeModel) -> PartialModel:
        """Hold parameters and buffers by their names; `modules` are what `train` and `eval` switch."""
        model = cls.__new__(cls)
        model._init(held, modules, whole)
        return model

    def _init(self, held: Mapping[str, Tensor], modules: Sequence[nn.Module], whole: WholeModel) -> None:
        super().__init__()
        self._modules_held = list(modules)  # a list: not submodules, which would name them twice
        for name in whole.shapes:
            if name in held:
                self._hold(name, held[name])

    def train(self, mode: bool = True) -> PartialModel:
        """Switch dropout on or off, in the layers."""
        for module in self._modules_held:
            module.train(mode)
        return super().train(mode)

    def _hold(self, name: str, tensor: Tensor) -> None:
        *path, last = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            place.register_parameter(last, tensor)
        else:
            place.register_buffer(last, tensor)
