"""What the planner of RoundPipe works on: layers with costs, micro-batches dealt to rounds; a partition is a `Slots`.

    slots    F0 .. F(a-1)   fused   B1 .. Bb          S = a + 1 + b, executed in this order, once a round
    devices  slot s of round r runs on device (r * S + s) mod N: the cursor goes on across rounds

Forward and backward cut the layers differently: a backward layer recomputes its forward first, so it weighs about three
times a forward one. The fused slot holds the last layers, runs forward, loss and backward of each micro-batch at once
and so recomputes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.schedules.roundpipe import Slots


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCosts:
    """What each layer costs for one micro-batch, in layer order; the head with the loss is the last layer."""

    forward_s: tuple[float, ...]
    """Seconds of the forward pass of each layer."""
    backward_s: tuple[float, ...]
    """Seconds of the backward pass of each layer, recomputation not counted."""
    transfer_s: float = 0.0
    """Seconds from the end of a micro-batch in one slot to its availability on another device."""
    weight_bytes: tuple[int, ...] = ()
    """Bytes that a device takes for each layer's weights; empty where memory is of no interest."""
    gradient_bytes: tuple[int, ...] = ()
    """Bytes that it takes for their gradients; empty where those are as many."""
    activation_bytes: tuple[int, ...] = ()
    """Bytes that each layer keeps of one micro-batch between its forward and its backward, its input included."""
    boundary_bytes: int = 0
    """Most bytes of one micro-batch between two layers. Its gradient takes as many."""
    first_trained: int = 0
    """Layers before this one lose their backward when the plan is run. Counts for bytes, not for seconds."""

    def __post_init__(self) -> None:
        num = len(self.forward_s)
        if num < 1 or len(self.backward_s) != num:
            raise PlanError(
                f"{num} forward and {len(self.backward_s)} backward costs; give one of each for every layer"
            )
        for name in ("weight_bytes", "gradient_bytes", "activation_bytes"):
            if len(getattr(self, name)) not in (0, num):
                raise PlanError(
                    f"{len(getattr(self, name))} entries in {name} for {num} layers; give one a layer, or none"
                )
        if not all(0 < t < float("inf") for t in (*self.forward_s, *self.backward_s)) or not self.transfer_s >= 0:
            raise PlanError("costs are positive finite seconds; measure the layers again")

    @classmethod
    def of(cls, costs: Costs) -> LayerCosts:
        """Return what the planner uses of a measured profile: mean seconds of its micro-batches, most bytes."""
        num = costs.num_layers
        forward_s, backward_s = costs.mean_s()
        boundary = sum(costs.boundary_bytes) / len(costs.boundary_bytes)

        def row(values: tuple[float, ...]) -> tuple[int, ...]:
            return tuple(int(x) for x in (values if len(values) == num else values * num))

        return cls(
            forward_s=forward_s,
            backward_s=backward_s,
            transfer_s=costs.hop_s + boundary / costs.link_bytes_per_s,
            weight_bytes=row(costs.weight_bytes),
            activation_bytes=tuple(map(max, zip(*map(row, costs.activation_bytes), strict=True))),
            boundary_bytes=math.ceil(max(costs.boundary_bytes)),
        )

    def dealt(self, share: float) -> LayerCosts:
        """Return the costs of micro-batches with `share` of the tokens; a hop's latency is not told from its bytes."""
        if share == 1:
            return self
        return replace(
            self,
            forward_s=tuple(share * t for t in self.forward_s),
            backward_s=tuple(share * t for t in self.backward_s),
            activation_bytes=tuple(math.ceil(share * n) for n in self.activation_bytes),
            boundary_bytes=math.ceil(share * self.boundary_bytes),
        )

    @property
    def num_layers(self) -> int:
        """Number of layers, the head included."""
        return len(self.forward_s)

    @property
    def useful_s(self) -> float:
        """Seconds of forward and backward of one micro-batch, the work no schedule can avoid."""
        return sum(self.forward_s) + sum(self.backward_s)


@dataclass(frozen=True, slots=True)
class Op:
    """One micro-batch through one slot: an entry of a device's order."""

    round: int
    slot: int
    microbatch: int
    """Number within the step, not within the round."""


def rounds_of(num_microbatches: int, num_rounds: int) -> tuple[int, ...]:
    """Deal a step's micro-batches to rounds as evenly as can be, larger rounds first."""
    if not 1 <= num_rounds <= num_microbatches:
        raise PlanError(f"{num_microbatches} micro-batches do not fill {num_rounds} rounds")
    return tuple(num_microbatches // num_rounds + (i < num_microbatches % num_rounds) for i in range(num_rounds))


def even_sizes(num_layers: int, num_slots: int) -> tuple[int, ...]:
    """Cut layers into slots whose sizes differ by at most one."""
    return tuple(num_layers // num_slots + (i < num_layers % num_slots) for i in range(num_slots))


def check_model(costs: LayerCosts, partition: Slots, rounds: Sequence[int], num_devices: int) -> None:
    """Refuse a partition that is not one of this model, and numbers that make no schedule."""
    if partition.num_layers != costs.num_layers:
        raise PlanError(f"the partition cuts {partition.num_layers} layers, the costs are of {costs.num_layers}")
    if partition.first_trainable:
        raise PlanError(f"{partition} leaves layers without backward; the planner takes models that train whole")
    if num_devices < 1 or min(rounds, default=0) < 1:
        raise PlanError(f"{num_devices} devices and rounds {tuple(rounds)}: each must be at least 1")
