"""What the commands of `pipeline.cli` read: schedules, costs, bytes; and the exit codes of what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from pipeline import named
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PipelineError, PlanError
from pipeline.schedule import Schedule
from pipeline.validate import validate

RANKS, MICROBATCHES = 4, 8
"""Of a schedule by name, unless given."""
_BYTES = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Asked:
    """What a command line says of a schedule; None where it says nothing."""

    ranks: int | None
    microbatches: int | None
    stages: int | None
    recompute: bool | None
    rounds: int | None
    open_slots: int | None


@contextmanager
def exits(code: int, *, plan: int = 2) -> Iterator[None]:
    """Turn an error of the package into a line and an exit code; a PlanError is bad input unless `plan` differs."""
    try:
        yield
    except PipelineError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(plan if isinstance(e, PlanError) else code) from e


def num_bytes(text: str | None) -> float | None:
    """Read `24GiB`, `512MiB` or a number."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?(?:e\d{1,2})?)\s*(|KiB|MiB|GiB)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write 24GiB, 512MiB, 64KiB or 25769803776")
    return float(match[1]) * _BYTES[match[2]]


def read_costs(path: Path | None, cap: float | None = None) -> Costs | None:
    """The costs of a file; with a memory cap they have to say something of bytes, or every cap would hold."""
    try:
        costs = None if path is None else Costs.from_json(path.read_text())
    except (OSError, ValueError, TypeError, RecursionError) as e:
        typer.echo(f"error: cannot read costs from {path}: {e}", err=True)
        raise typer.Exit(2) from e
    if cap is not None and (costs is None or not costs.count_bytes):
        raise typer.BadParameter("needs --costs with weight_bytes or activation_bytes", param_hint="--memory-cap")
    return costs


def read_events(path: Path) -> list[Any]:
    """The trace events of a run: a file of JSON lines, or a folder with a `rank-*.jsonl` for each rank."""
    try:
        files = sorted(path.glob("rank-*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ValueError("the folder has no rank-*.jsonl; give the folder trace/ of a run")
        return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as e:
        typer.echo(f"error: cannot read events from {path}: {e}", err=True)
        raise typer.Exit(2) from e


def is_file(name: str) -> bool:
    """Whether SCHEDULE names a file."""
    return Path(name).suffix in (".json", ".csv", ".txt")


def schedule_of(name: str, costs: Costs | None, asked: Asked) -> Schedule:
    """A schedule of compute actions by name, or from a file as it is there; what it cannot obey is bad input."""
    with exits(2):
        if is_file(name):
            found = named.read_schedule(Path(name))
            _check_file(name, found, costs, asked)
            return found
        if name == "roundpipe" and asked.recompute is not None:
            raise PlanError("roundpipe always recomputes; leave --recompute and --no-recompute out")
        return named_schedule(name, costs, asked)


def named_schedule(name: str, costs: Costs | None, asked: Asked) -> Schedule:
    """A schedule by name. Raises PlanError or ScheduleError for what does not make one."""
    return named.named_schedule(
        name,
        devices=asked.ranks or RANKS,
        microbatches=asked.microbatches or MICROBATCHES,
        costs=costs,
        stages=asked.stages,
        recompute=bool(asked.recompute),
        rounds=asked.rounds or 1,
        open_slots=asked.open_slots or 1,
    )


def _check_file(name: str, found: Schedule, costs: Costs | None, asked: Asked) -> None:
    """Raise PlanError for settings that contradict the schedule of a file, or are for schedules by name."""
    has = {
        "ranks": found.num_devices, "microbatches": found.size(0), "stages": found.num_stages, "rounds": found.rounds,
    }  # fmt: skip
    for setting, value in asdict(asked).items():
        option = "--" + setting.replace("_", "-")
        if value is not None and setting not in has:
            raise PlanError(f"{name} has its actions already, and {option} changes none; leave it out")
        if value is not None and value != has[setting]:
            raise PlanError(f"{name} has {has[setting]} {setting}, and {option} is {value}; leave it out")
    if costs is not None and costs.num_layers not in (1, found.num_layers):
        raise PlanError(f"{name} has {found.num_layers} layers, and the costs are of {costs.num_layers}")


def whole(schedule: Schedule) -> Schedule:
    """Validated, and completed with transfers unless it has some already."""
    with exits(1):
        validate(schedule)
        has = {a.op.value for row in schedule.devices for a in row} & {"SEND", "RECV", "PUT", "GET", "UPLOAD"}
        return schedule if has else complete(schedule)
