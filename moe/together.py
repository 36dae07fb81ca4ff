"""What the ranks of a model do together outside its layers: sums and answers, on the lanes of the layers.

So they end by the deadline of the layers, keep the order of the lanes, and tell of a rank that is lost or late alike.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moe.errors import MoeConfigError
from moe.issue import IssueQueue
from moe.lanes import Axis
from moe.parallel import ParallelExperts, expert_layers


class Together:
    """The ranks of a parallelized model, for one call: each asks the same things of it in the same order.

    Everything raises ExchangeError, naming this rank, the call and the axis, when a rank is lost or late.
    """

    def __init__(self, model: nn.Module, call: str) -> None:
        """Raise MoeConfigError when the model is not expert-parallel."""
        layers = list(expert_layers(model).values())
        if not layers:
            raise MoeConfigError("this model is not expert-parallel; call moe.parallelize(model, mesh, ...) first")
        self.placement, self._call = layers[0].placement, call
        self._axes = axes_of(layers[0])
        self._rank = dist.get_rank()

    def reduce(self, value: Tensor, axis: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Make `value` that of all ranks of an axis, in place."""
        if (found := self._axes.get(axis)) is not None:
            run = partial(dist.all_reduce, value, op, group=found.group)
            found.lane.call(run, op=f"reduction over {axis}", call=self._call)

    def join(self, value: Tensor, axis: str) -> list[Tensor]:
        """Return what every rank of an axis gave, in their order; all of one shape."""
        if (found := self._axes.get(axis)) is None:
            return [value]
        parts = [value.new_empty(value.shape) for _ in range(found.group.size())]
        run = partial(dist.all_gather, parts, value.contiguous(), group=found.group)
        found.lane.call(run, op=f"gather over {axis}", call=self._call)
        return parts

    def gather(self, own: Any) -> list[Any]:
        """Return what every rank of the mesh gave, by rank."""
        said = {self._rank: own}
        for name, axis in self._axes.items():  # one axis after the other, so that in the end all know all
            every: list[dict[int, Any]] = [{} for _ in range(axis.group.size())]
            run = partial(dist.all_gather_object, every, said, group=axis.group)
            axis.lane.call(run, op=f"answers over {name}", call=self._call)
            said = {rank: one for part in every for rank, one in part.items()}
        return [said[rank] for rank in sorted(said)]


def axes_of(layer: ParallelExperts) -> dict[str, Axis]:
    """Return the axes of a layer's mesh that have ranks, by name: those that are beside the experts first."""
    lanes, place = layer.runner.lanes, layer.placement
    axes = dict(lanes.beside)
    for name, lane, group in ((place.ep, lanes.inter, lanes.ep), (place.esp, lanes.intra, lanes.esp)):
        if name is not None and group is not None and isinstance(lane, IssueQueue):
            axes[name] = Axis(lane, group)
    return axes
