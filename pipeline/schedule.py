"""A schedule: for each device the list of actions it runs, in order. The one object from plan to trace.

    schedule = SCHEDULES["1f1b"](devices=4, microbatches=8)
    for action in schedule.of(rank):            # no decisions left to make
        handlers[action.op](action)

It is generated (`schedules`), completed with communication (`comms`), validated (`validate`), simulated (`simulate`),
executed (the runtime) and traced. Text and JSON forms read themselves back; the CSV of torch.distributed.pipelining is
in `torch_csv`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from pipeline.actions import COMPUTE, Action, Op
from pipeline.errors import ScheduleError
from pipeline.units import Unit

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Per-device action lists and what they act on.

    `stages[s]` is the layer range (first, one past the last) of stage s. Micro-batches are numbered through all
    `steps` optimizer steps of the schedule, the same number in each; `units`, where given, describes each of them.
    `staleness` is how many optimizer steps the weights of a micro-batch may lag behind. Layers before
    `first_trainable` are frozen and have no backward. In RoundPipe the micro-batches of a step pass in `rounds`.
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

    def __post_init__(self) -> None:
        if not self.devices or not self.stages or self.num_microbatches < 1 or self.steps < 1:
            raise ScheduleError(
                f"schedule {self.name} has {len(self.devices)} devices, {len(self.stages)} stages, "
                f"{self.num_microbatches} micro-batches and {self.steps} steps; it needs at least one of each"
            )
        if self.num_microbatches % self.steps:
            raise ScheduleError(f"{self.num_microbatches} micro-batches do not split over {self.steps} equal steps")
        for stage, (lo, hi) in enumerate(self.stages):
            if not 0 <= lo < hi:
                raise ScheduleError(f"stage {stage} has layers {lo}:{hi}; a stage holds at least one layer")
        if self.units is not None and len(self.units) != self.num_microbatches:
            raise ScheduleError(f"{len(self.units)} units are given for {self.num_microbatches} micro-batches")
        if not 1 <= self.rounds <= self.num_microbatches // self.steps:
            raise ScheduleError(
                f"{self.rounds} rounds for {self.num_microbatches // self.steps} micro-batches a step; "
                "a round needs at least one"
            )
        object.__setattr__(self, "devices", tuple(self._stamped(d, row) for d, row in enumerate(self.devices)))

    def _stamped(self, device: int, row: Iterable[Action]) -> tuple[Action, ...]:
        row = tuple(a if a.device == device else replace(a, device=device) if a.device is None else a for a in row)
        for a in row:
            if a.device != device:
                raise ScheduleError(f"{a} stands in the list of device {device}")
            if a.stage >= len(self.stages) or (a.microbatch or 0) >= self.num_microbatches:
                raise ScheduleError(
                    f"{a.label} on device {device}, but schedule {self.name} has stages 0 to {len(self.stages) - 1} "
                    f"and micro-batches 0 to {self.num_microbatches - 1}"
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
        return microbatch * self.steps // self.num_microbatches

    def round(self, microbatch: int) -> int:
        """The round of its step that a micro-batch belongs to; the first rounds are the longer ones."""
        size, extra = divmod(self.num_microbatches // self.steps, self.rounds)
        m = microbatch % (self.num_microbatches // self.steps)
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
        if self.units is not None:
            head.append("units " + " ".join(map(str, self.units)))
        rows = (f"device {d}: " + " ".join(a.text(device=False) for a in row) for d, row in enumerate(self.devices))
        return "\n".join([*head, *rows]) + "\n"

    @staticmethod
    def from_text(text: str) -> Schedule:
        """Read what `to_text` wrote.

        Raises ScheduleError with the line that is wrong.
        """
        fields: dict[str, Any] = {"devices": []}
        for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
            try:
                _read_line(line.strip(), fields)
            except (ValueError, IndexError) as e:
                raise ScheduleError(f"line {number} of a schedule, {line.strip()[:60]!r}: {e}") from e
        return _made(fields, "text")

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
            "stages": [list(s) for s in self.stages],
            "units": None if self.units is None else [str(u) for u in self.units],
            "devices": [[a.text(device=False) for a in row] for row in self.devices],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any] | str) -> Schedule:
        """Read what `to_json` gave, or its dump as a string."""
        fields: dict[str, Any] = json.loads(value) if isinstance(value, str) else dict(value)
        version = fields.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ScheduleError(f"a schedule of format {version}; this version reads format {FORMAT_VERSION}")
        fields["stages"] = tuple((s[0], s[1]) for s in fields["stages"])
        fields["devices"] = [[Action.parse(a) for a in row] for row in fields["devices"]]
        if fields.get("units") is not None:
            fields["units"] = tuple(Unit.parse(u) for u in fields["units"])
        return _made(fields, "JSON")


def _read_line(line: str, fields: dict[str, Any]) -> None:
    key, _, rest = line.partition(" ")
    if key == "schedule":
        fields["name"] = rest.strip()
    elif key == "microbatches":
        words = line.split()
        values = {k: int(v) for k, v in zip(words[::2], words[1::2], strict=True)}
        fields["num_microbatches"] = values.pop("microbatches")
        fields |= values
    elif key == "stages":
        fields["stages"] = tuple((int(lo), int(hi)) for lo, hi in (s.split(":") for s in rest.split()))
    elif key == "units":
        fields["units"] = tuple(Unit.parse(u) for u in rest.split())
    elif key == "device":
        number, _, row = rest.partition(":")
        if int(number) != len(fields["devices"]):
            raise ValueError(f"expected device {len(fields['devices'])}")
        fields["devices"].append([Action.parse(a) for a in row.split()])
    else:
        raise ValueError("expected schedule, microbatches, stages, units or device")


def _made(fields: dict[str, Any], form: str) -> Schedule:
    missing = {"name", "stages", "num_microbatches"} - fields.keys()
    if missing or not fields["devices"]:
        raise ScheduleError(f"the {form} of a schedule lacks {', '.join(sorted(missing)) or 'its devices'}")
    return Schedule(**{**fields, "devices": tuple(tuple(row) for row in fields["devices"])})
