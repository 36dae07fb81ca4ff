"""One layer as RoundPipe runs it: a function that finds its weights in place, and the parameters they are put into.

A device is a stateless worker, so the parameters of a layer hold nothing between its slots: the worker binds the slot's
weights to them for the time of an action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.errors import PlanError


@dataclass(frozen=True, slots=True)
class SlotLayer:
    """A layer of a model. `parameters` are by original name; a tied weight has one name in all layers that use it."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    run: Callable[[Tensor | None, int], Tensor]
    """(input, micro-batch of the run) -> output. The input is None for the first layer, the output a 0-d loss for the
    last."""
    rows: Callable[[int], Tensor] | None = None
    """Of a table of which a micro-batch reads some rows only (an embedding): which, int64 [R], ascending, each once.
    Its one parameter then holds those R rows while `run` is called, and is an object of its own also where it is tied.
    """

    @property
    def trained(self) -> bool:
        """Whether it has something to train."""
        return any(p.requires_grad for p in self.parameters.values())


def first_trained(layers: Sequence[SlotLayer]) -> int:
    """Return the number of the first layer that is trained: those before it have no backward.

    Raises PlanError when there is none.
    """
    found = next((i for i, layer in enumerate(layers) if layer.trained), None)
    if found is None:
        raise PlanError(f"none of the {len(layers)} layers has a parameter that is trained; unfreeze some")
    return found
