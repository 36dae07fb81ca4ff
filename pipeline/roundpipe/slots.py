"""What the planner of RoundPipe works on: layers with costs, a partition into slots, micro-batches dealt to rounds.

    slots    F0 .. F(a-1)   fused   B1 .. Bb          S = a + 1 + b, executed in this order, once a round
    devices  slot s of round r runs on device (r * S + s) mod N: the cursor goes on across rounds

Forward and backward cut the layers differently: a backward layer recomputes its forward first, so it weighs about three
times a forward one. The fused slot holds the last layers, runs forward, loss and backward of each micro-batch at once
and so recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pipeline.errors import PlanError


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
    """Bytes of each layer's weights (gradients take the same); empty where memory is of no interest."""
    activation_bytes: tuple[int, ...] = ()
    """Bytes that each layer keeps of one micro-batch between its forward and its backward."""

    def __post_init__(self) -> None:
        num = len(self.forward_s)
        if num < 1 or len(self.backward_s) != num:
            raise PlanError(
                f"{num} forward and {len(self.backward_s)} backward costs; give one of each for every layer"
            )
        for name in ("weight_bytes", "activation_bytes"):
            if len(getattr(self, name)) not in (0, num):
                raise PlanError(
                    f"{len(getattr(self, name))} entries in {name} for {num} layers; give one a layer, or none"
                )
        if not all(0 < t < float("inf") for t in (*self.forward_s, *self.backward_s)) or not self.transfer_s >= 0:
            raise PlanError("costs are positive finite seconds; measure the layers again")

    @property
    def num_layers(self) -> int:
        """Number of layers, the head included."""
        return len(self.forward_s)

    @property
    def useful_s(self) -> float:
        """Seconds of forward and backward of one micro-batch, the work no schedule can avoid."""
        return sum(self.forward_s) + sum(self.backward_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """How the layers are cut: sizes of the forward slots, layers in the fused slot, sizes of the backward slots."""

    forward: tuple[int, ...]
    """Layers in each forward slot, from the first layer on."""
    fused: int
    """Last layers, run by the fused slot; at least the head."""
    backward: tuple[int, ...]
    """Layers in each backward slot, from the last layer that is not fused back to the first."""

    def __post_init__(self) -> None:
        if self.fused < 1 or min((*self.forward, *self.backward), default=1) < 1:
            raise PlanError(f"{self}: every slot, the fused one too, needs at least one layer")
        if sum(self.forward) != sum(self.backward):
            raise PlanError(
                f"{self}: forward slots hold {sum(self.forward)} layers, backward ones {sum(self.backward)}"
            )

    @property
    def num_layers(self) -> int:
        """Number of layers that it cuts."""
        return sum(self.forward) + self.fused

    @property
    def num_slots(self) -> int:
        """S = a + 1 + b."""
        return len(self.forward) + 1 + len(self.backward)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Layers `lo .. hi` (exclusive) of every slot, in slot order."""
        ups = [0, *accumulate(self.forward)]
        downs = [ups[-1] - n for n in (0, *accumulate(self.backward))]
        forward = list(pairwise(ups))
        return (*forward, (ups[-1], self.num_layers), *zip(downs[1:], downs, strict=False))

    @property
    def input_slots(self) -> tuple[int, ...]:
        """For each slot, the forward slot whose word says that its saved input is there; -1 for the model's input.

        A recomputation starts from the boundary activation that the forward pass stored, so a backward slot waits on
        this slot as well as on the gradient.
        """
        ends = list(accumulate(self.forward))

        def holder(lo: int) -> int:
            return -1 if lo == 0 else next(i for i, end in enumerate(ends) if end >= lo)

        return tuple(holder(lo) for lo, _ in self.ranges)


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


def check_model(costs: LayerCosts, partition: Partition, rounds: Sequence[int], num_devices: int) -> None:
    """Refuse a partition that is not one of this model, and numbers that make no schedule."""
    if partition.num_layers != costs.num_layers:
        raise PlanError(f"the partition cuts {partition.num_layers} layers, the costs are of {costs.num_layers}")
    if num_devices < 1 or min(rounds, default=0) < 1:
        raise PlanError(f"{num_devices} devices and rounds {tuple(rounds)}: each must be at least 1")
