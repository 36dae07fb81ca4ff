"""RoundPipe (arXiv 2604.27085): slots of layers that belong to no device, dealt to the devices in turn.

Slots run in order: forward slots, one fused slot (forward, loss and backward of the last layers), backward slots
(recompute, backward). Forward and backward slots cut the layers differently. Slot k of the whole schedule, counted
through rounds and steps, runs on device k mod devices; the cursor is never reset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.actions import Action, Op
from pipeline.errors import PlanError
from pipeline.schedule import Schedule
from pipeline.schedules.build import check_counts, even_stages

Order = Sequence[Sequence[tuple[int, int]]]
"""Of each device, its (slot, micro-batch) pairs of one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Layers per slot, in running order: forward from layer 0 up, then the fused slot, then backward down."""

    forward: tuple[int, ...]
    fused: int
    backward: tuple[int, ...]

    def __post_init__(self) -> None:
        if min((*self.forward, self.fused, *self.backward)) < 1:
            raise PlanError(f"{self} has a slot with no layer; every slot holds at least one, the head is a layer too")
        if sum(self.backward) > sum(self.forward):
            raise PlanError(f"{self} runs {sum(self.backward)} layers backward and {sum(self.forward)} forward")

    @property
    def num_layers(self) -> int:
        """Layers of the model, embedding and head counted as the costs count them."""
        return sum(self.forward) + self.fused

    @property
    def num_slots(self) -> int:
        """Slots of one round."""
        return len(self.forward) + 1 + len(self.backward)

    @property
    def first_trainable(self) -> int:
        """Layers without backward, all at the front: those before the last backward slot."""
        return sum(self.forward) - sum(self.backward)

    def ranges(self) -> tuple[tuple[Op, tuple[int, int]], ...]:
        """(F, FB or B; layer range) of every slot in running order."""
        found: list[tuple[Op, tuple[int, int]]] = []
        lo = 0
        for n in self.forward:
            found.append((Op.F, (lo, lo + n)))
            lo += n
        found.append((Op.FB, (lo, lo + self.fused)))
        for n in self.backward:
            found.append((Op.B, (lo - n, lo)))
            lo -= n
        return tuple(found)


def even_slots(layers: int, devices: int) -> Slots:
    """A partition to begin with: the last layer fused, backward slots of one layer, forward slots of up to three.

    A backward with recompute costs about three forwards. Plans that minimise the makespan come from the planner.
    """
    if layers < 2:
        raise PlanError(f"a model of {layers} layer has no slots; RoundPipe needs at least 2, the head included")
    check_counts("roundpipe", devices, 1, layers)
    forward = even_stages(layers - 1, -(-(layers - 1) // 3))
    return Slots(forward=tuple(hi - lo for lo, hi in forward), fused=1, backward=(1,) * (layers - 1))


def roundpipe(
    *,
    devices: int,
    microbatches: int | Sequence[int],
    slots: Slots | None = None,
    layers: int | None = None,
    rounds: int = 1,
    steps: int = 1,
    staleness: int = 0,
    order: Order | Mapping[int, Order] | None = None,
) -> Schedule:
    """`microbatches` of one step pass through all slots in `rounds`, for `steps` optimizer steps.

    With a sequence, so many pass in each step, and `steps` is not looked at; a step with fewer of them than rounds has
    fewer rounds. In strict slot order, which `dispatch.ready_first` can change; or as `order` says, for steps of any
    one number of micro-batches or of each. In later steps the devices change places with the cursor. With `staleness`
    1, step s runs on the weights that the steps up to s - 2 made, so that the optimizer of step s - 1 need not be
    waited for.

    Raises PlanError or ScheduleError for slots, rounds or steps that do not fit.
    """
    if staleness not in (0, 1) or steps < 1:
        raise PlanError(f"staleness is {staleness} and steps {steps}; staleness is 0 or 1, and steps at least 1")
    sizes = (microbatches,) * steps if isinstance(microbatches, int) else tuple(microbatches)
    check_counts("roundpipe", devices, min(sizes, default=0))
    if slots is None:
        slots = even_slots(layers if layers is not None else 3 * devices + 1, devices)
    elif layers not in (None, slots.num_layers):
        raise PlanError(f"the slots hold {slots.num_layers} layers and the model has {layers}")
    orders = {size: _order(order, devices, size, slots, min(rounds, size)) for size in set(sizes)}
    ranges = slots.ranges()
    rows: list[list[Action]] = [[] for _ in range(devices)]
    first = cursor = 0
    for step, size in enumerate(sizes):
        version = max(0, step - staleness) if staleness else None
        for d, pairs in enumerate(orders[size]):
            for slot, m in pairs:
                rows[(d + cursor) % devices] += _actions(ranges[slot][0], slot, first + m, version)
        first, cursor = first + size, cursor + min(rounds, size) * len(ranges)
    return Schedule(
        name="roundpipe",
        devices=tuple(tuple(row) for row in rows),
        stages=tuple(r for _, r in slots.ranges()),
        num_microbatches=sum(sizes),
        steps=len(sizes),
        sizes=sizes,
        staleness=staleness,
        first_trainable=slots.first_trainable,
        rounds=rounds if isinstance(microbatches, int) else min(rounds, max(sizes)),
    )


def strict_order(devices: int, microbatches: int, slots: Slots, rounds: int) -> list[list[tuple[int, int]]]:
    """For each device its (slot, micro-batch) pairs of one step, slot after slot."""
    order: list[list[tuple[int, int]]] = [[] for _ in range(devices)]
    cursor = 0
    for lo, hi in even_stages(microbatches, rounds):
        for slot in range(len(slots.ranges())):
            order[cursor % devices] += [(slot, m) for m in range(lo, hi)]
            cursor += 1
    return order


def _order(
    given: Order | Mapping[int, Order] | None, devices: int, microbatches: int, slots: Slots, rounds: int
) -> Order:
    """The order of a step of so many micro-batches."""
    check_counts("roundpipe", 1, microbatches, slots.num_slots)
    if given is None:
        return strict_order(devices, microbatches, slots, rounds)
    order = given.get(microbatches, ()) if isinstance(given, Mapping) else given
    pairs, num = {pair for row in order for pair in row}, slots.num_slots
    inside = all(0 <= slot < num and 0 <= m < microbatches for slot, m in pairs)
    if not (len(order) == devices and inside and len(pairs) == sum(map(len, order)) == num * microbatches):
        raise PlanError(
            f"the order has {sum(map(len, order))} pairs on {len(order)} devices; it needs every one of {num} slots "
            f"and {microbatches} micro-batches once, on {devices} devices"
        )
    return order


def _actions(op: Op, slot: int, microbatch: int, version: int | None) -> Iterator[Action]:
    if op is Op.B:
        yield Action(Op.R, slot, microbatch, version=version)
    yield Action(op, slot, microbatch, version=version)
