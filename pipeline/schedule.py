"""A schedule: for each device the list of actions it runs, in order. The one object from plan to trace.

    schedule = SCHEDULES["1f1b"](devices=4, microbatches=8)
    for action in schedule.of(rank):            # no decisions left to make
        handlers[action.op](action)

It is generated (`schedules`), completed with communication (`comms`), validated (`validate`), simulated (`simulate`),
executed (the runtime) and traced. Text and JSON forms read themselves back; the CSV of torch.distributed.pipelining is
in `torch_csv`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, zip_longest
from typing import Any

from pipeline.actions import COMPUTE, Action, Op
from pipeline.errors import ScheduleError
from pipeline.reading import FORMAT_VERSION, fields_of_json, fields_of_text
from pipeline.units import Unit

MOST_LAYERS, MOST_MICROBATCHES = 2**13, 2**20
"""Larger numbers are a mistake in a file; checks go through every layer of every micro-batch."""
MOST_PAIRS = 2**21
"""Of stages and micro-batches; more do not fit into memory as actions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Per-device action lists and what they act on.

    `stages[s]` is the layer range (first, one past the last) of stage s. Micro-batches are numbered through all
    `steps` optimizer steps of the schedule: `sizes` of them in each, or the same number (None); `units`, where given,
    describes each of them. `staleness` is how many optimizer steps the weights of a micro-batch may lag behind. Layers
    before `first_trainable` are frozen and have no backward. In RoundPipe the micro-batches of a step pass in `rounds`,
    fewer where a step has fewer micro-batches.
    """

    name: str
    devices: tuple[tuple[Action, ...], ...]
    stages: tuple[tuple[int, int], ...]
    num_microbatches: int
    units: tuple[Unit, ...] | None = None
    steps: int = 1
    staleness: int = 0
    first_trainable: int = 0
    rounds: int = 1
    sizes: tuple[int, ...] | None = None
    _firsts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First micro-batch of every step, and one past the last of all."""

    def __post_init__(self) -> None:
        if min(self.staleness, self.first_trainable) < 0:
            raise ScheduleError(
                f"schedule {self.name} has staleness {self.staleness} and {self.first_trainable} layers without "
                "backward; neither is below 0"
            )
        if not self.devices or not self.stages or self.num_microbatches < 1 or self.steps < 1:
            raise ScheduleError(
                f"schedule {self.name} has {len(self.devices)} devices, {len(self.stages)} stages, "
                f"{self.num_microbatches} micro-batches and {self.steps} steps; it needs at least one of each"
            )
        if self.num_layers > MOST_LAYERS or self.num_microbatches > MOST_MICROBATCHES:
            raise ScheduleError(
                f"schedule {self.name} has {self.num_layers} layers and {self.num_microbatches} micro-batches; it may "
                f"have {MOST_LAYERS} and {MOST_MICROBATCHES} at most"
            )
        for stage, (lo, hi) in enumerate(self.stages):
            if not 0 <= lo < hi:
                raise ScheduleError(f"stage {stage} has layers {lo}:{hi}; a stage holds at least one layer")
        if self.units is not None and len(self.units) != self.num_microbatches:
            raise ScheduleError(f"{len(self.units)} units are given for {self.num_microbatches} micro-batches")
        self._deal()
        if not 1 <= self.rounds <= max(self.size(step) for step in range(self.steps)):
            raise ScheduleError(
                f"{self.rounds} rounds for {max(self.size(step) for step in range(self.steps))} micro-batches a step; "
                "a round needs at least one"
            )
        object.__setattr__(self, "devices", tuple(self._stamped(d, row) for d, row in enumerate(self.devices)))

    def _deal(self) -> None:
        """Number the micro-batches through the steps."""
        given = self.sizes
        if given is None and self.num_microbatches % self.steps:
            raise ScheduleError(f"{self.num_microbatches} micro-batches do not split over {self.steps} equal steps")
        sizes = given or (self.num_microbatches // self.steps,) * self.steps
        if len(sizes) != self.steps or sum(sizes) != self.num_microbatches or min(sizes) < 1:
            raise ScheduleError(
                f"steps of {sizes} micro-batches are given for {self.num_microbatches} in {self.steps} steps; each has "
                "at least one"
            )
        object.__setattr__(self, "sizes", None if len(set(sizes)) == 1 else tuple(sizes))
        object.__setattr__(self, "_firsts", (0, *accumulate(sizes)))

    def _stamped(self, device: int, row: Iterable[Action]) -> tuple[Action, ...]:
        row = tuple(a if a.device == device else replace(a, device=device) if a.device is None else a for a in row)
        layers = self.num_layers
        for a in row:
            if a.device != device:
                raise ScheduleError(f"{a} stands in the list of device {device}")
            past = a.layers is not None and a.layers[1] > layers
            if a.stage >= len(self.stages) or (a.microbatch or 0) >= self.num_microbatches or past:
                raise ScheduleError(
                    f"{a} on device {device}, but schedule {self.name} has stages 0 to {len(self.stages) - 1} of "
                    f"{layers} layers, and micro-batches 0 to {self.num_microbatches - 1}"
                )
        return row

    @property
    def num_devices(self) -> int:
        """Rows of the table."""
        return len(self.devices)

    @property
    def num_stages(self) -> int:
        """Layer ranges; in RoundPipe, slots."""
        return len(self.stages)

    @property
    def num_layers(self) -> int:
        """One past the last layer of any stage."""
        return max(hi for _, hi in self.stages)

    def of(self, device: int) -> tuple[Action, ...]:
        """What `device` runs, in order."""
        return self.devices[device]

    def layers(self, action: Action) -> tuple[int, int]:
        """First layer and one past the last of an action."""
        return action.layers or self.stages[action.stage]

    def step(self, microbatch: int) -> int:
        """The optimizer step, counted from 0, that a micro-batch belongs to."""
        return bisect_right(self._firsts, microbatch, hi=self.steps) - 1

    def size(self, step: int) -> int:
        """Micro-batches of an optimizer step."""
        return self._firsts[step + 1] - self._firsts[step]

    def first(self, step: int) -> int:
        """The first micro-batch of an optimizer step."""
        return self._firsts[step]

    def place(self, microbatch: int) -> int:
        """The number of a micro-batch within its step."""
        return microbatch - self._firsts[self.step(microbatch)]

    def rounds_of(self, step: int) -> int:
        """The rounds in which the micro-batches of a step pass."""
        return min(self.rounds, self.size(step))

    def round(self, microbatch: int) -> int:
        """The round of its step that a micro-batch belongs to; the first rounds are the longer ones."""
        step = self.step(microbatch)
        size, extra = divmod(self.size(step), self.rounds_of(step))
        m = microbatch - self._firsts[step]
        return m // (size + 1) if m < extra * (size + 1) else extra + (m - extra * (size + 1)) // size

    def version(self, action: Action) -> int:
        """Optimizer steps in the weights that a compute action or UPLOAD uses; by default, all before its own step."""
        return self.step(action.microbatch or 0) if action.version is None else action.version

    def devices_of_stage(self) -> dict[int, int]:
        """Stage to device, of a weight-bound schedule.

        Raises ScheduleError if a stage computes on two devices, as it may in RoundPipe.
        """
        found: dict[int, int] = {}
        for device, row in enumerate(self.devices):
            for stage in {a.stage for a in row if a.op in COMPUTE}:
                if found.setdefault(stage, device) != device:
                    raise ScheduleError(f"stage {stage} of {self.name} runs on devices {found[stage]} and {device}")
        return found

    def recomputed(self) -> frozenset[tuple[int, int]]:
        """(stage, micro-batch) pairs that run forward again, so that their first forward keeps only its input."""
        return frozenset((a.stage, a.microbatch or 0) for row in self.devices for a in row if a.op is Op.R)

    def with_devices(self, rows: Sequence[Sequence[Action]], **changes: Any) -> Schedule:
        """The same schedule with other action lists."""
        return replace(self, devices=tuple(tuple(row) for row in rows), **changes)

    def table(self, at: tuple[int, int] | None = None, context: int | None = None) -> str:
        """Positions down, devices across; an arrow marks the row of `at`, a (device, position).

        With `context`, only that many rows on either side of the arrow.
        """
        columns = [[a.label for a in row] for row in self.devices]
        widths = [max([len(f"device {d}"), *map(len, c)]) for d, c in enumerate(columns)]
        lines = ["      " + " ".join(f"device {d}".ljust(w) for d, w in enumerate(widths))]
        for i, cells in enumerate(zip_longest(*columns, fillvalue="")):
            if at is not None and context is not None and abs(i - at[1]) > context:
                continue
            row = " ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True))
            arrow = f"  <-- here, device {at[0]}" if at is not None and i == at[1] else ""
            lines.append(f"{i:>4}: {row}{arrow}".rstrip())
        return "\n".join(lines)

    def to_text(self) -> str:
        """Header, then one line a device; `from_text` reads it back."""
        head = [
            f"schedule {self.name}",
            f"microbatches {self.num_microbatches} steps {self.steps} staleness {self.staleness} "
            f"first_trainable {self.first_trainable} rounds {self.rounds}",
            "stages " + " ".join(f"{lo}:{hi}" for lo, hi in self.stages),
        ]
        if self.sizes is not None:
            head.append("sizes " + " ".join(map(str, self.sizes)))
        if self.units is not None:
            head.append("units " + " ".join(map(str, self.units)))
        rows = (f"device {d}: " + " ".join(a.text(device=False) for a in row) for d, row in enumerate(self.devices))
        return "\n".join([*head, *rows]) + "\n"

    @staticmethod
    def from_text(text: str) -> Schedule:
        """Read what `to_text` wrote.

        Raises ScheduleError with the line that is wrong.
        """
        return Schedule(**fields_of_text(text))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "num_microbatches": self.num_microbatches,
            "steps": self.steps,
            "staleness": self.staleness,
            "first_trainable": self.first_trainable,
            "rounds": self.rounds,
            **({} if self.sizes is None else {"sizes": list(self.sizes)}),
            "stages": [list(s) for s in self.stages],
            "units": None if self.units is None else [str(u) for u in self.units],
            "devices": [[a.text(device=False) for a in row] for row in self.devices],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any] | str) -> Schedule:
        """Read what `to_json` gave, or its dump as a string.

        Raises ScheduleError for anything else.
        """
        return Schedule(**fields_of_json(value))
