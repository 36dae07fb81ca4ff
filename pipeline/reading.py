"""The text and JSON forms of a schedule, read: a file gives the fields of a `Schedule`, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.actions import Action
from pipeline.errors import ScheduleError
from pipeline.units import Unit

FORMAT_VERSION = 1
_INTEGERS = ("num_microbatches", "steps", "staleness", "first_trainable", "rounds")


def fields_of_text(text: str) -> dict[str, Any]:
    """Return the fields of a schedule in text form. Raises ScheduleError with the line that is wrong."""
    fields: dict[str, Any] = {"devices": []}
    for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        try:
            _read_line(line.strip(), fields)
        except (ValueError, IndexError) as e:
            raise ScheduleError(f"line {number} of a schedule, {line.strip()[:60]!r}: {e}") from e
    return _whole(fields, "text")


def fields_of_json(value: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return the fields of a schedule in JSON, as values or as a string. Raises ScheduleError for anything else."""
    try:
        fields = _plain(value)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        if isinstance(e, ScheduleError):
            raise
        raise ScheduleError(f"this is no schedule as JSON: {type(e).__name__}: {str(e)[:200]}") from e
    return _whole(fields, "JSON")


def _plain(value: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return the fields; raises whatever comes of values that are none."""
    fields: dict[str, Any] = dict(json.loads(value) if isinstance(value, str) else value)
    version = fields.pop("format_version", None)
    if version is None:
        raise ScheduleError(
            f"this JSON is no schedule: it has {', '.join(sorted(map(str, fields)))[:200] or 'nothing'}, and no "
            "format_version; `python -m pipeline show NAME --form json` prints one"
        )
    if version != FORMAT_VERSION:
        raise ScheduleError(f"a schedule of format {str(version)[:60]}; this version reads format {FORMAT_VERSION}")
    for name in fields.keys() & {*_INTEGERS}:
        _integer(fields[name], name)
    if not isinstance(fields["name"], str):
        raise ScheduleError(f"the name of a schedule is {str(fields['name'])[:60]}; it takes a string")
    fields["stages"] = tuple((_integer(lo, "stages"), _integer(hi, "stages")) for lo, hi in fields["stages"])
    fields["devices"] = [[Action.parse(action) for action in row] for row in fields["devices"]]
    if fields.get("sizes") is not None:
        fields["sizes"] = tuple(_integer(size, "sizes") for size in fields["sizes"])
    if fields.get("units") is not None:
        fields["units"] = tuple(Unit.parse(unit) for unit in fields["units"])
    return fields


def _integer(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ScheduleError(f"{name} of a schedule holds {str(value)[:60]}; it takes whole numbers, 0 or more")
    return value


def _read_line(line: str, fields: dict[str, Any]) -> None:
    key, _, rest = line.partition(" ")
    if key == "schedule":
        fields["name"] = rest.strip()
    elif key == "microbatches":
        words = line.split()
        values = {k: int(v) for k, v in zip(words[::2], words[1::2], strict=True)}
        fields["num_microbatches"] = values.pop("microbatches")
        if unknown := values.keys() - {*_INTEGERS}:
            raise ValueError(f"{', '.join(sorted(unknown))[:60]} is no number of a schedule")
        fields |= values
    elif key == "stages":
        fields["stages"] = tuple((int(lo), int(hi)) for lo, hi in (s.split(":") for s in rest.split()))
    elif key == "sizes":
        fields["sizes"] = tuple(map(int, rest.split()))
    elif key == "units":
        fields["units"] = tuple(Unit.parse(u) for u in rest.split())
    elif key == "device":
        number, _, row = rest.partition(":")
        if int(number) != len(fields["devices"]):
            raise ValueError(f"expected device {len(fields['devices'])}")
        fields["devices"].append([Action.parse(a) for a in row.split()])
    else:
        raise ValueError("expected schedule, microbatches, sizes, stages, units or device")


def _whole(fields: dict[str, Any], form: str) -> dict[str, Any]:
    missing = {"name", "stages", "num_microbatches"} - fields.keys()
    if missing or not fields["devices"]:
        raise ScheduleError(f"the {form} of a schedule lacks {', '.join(sorted(missing)) or 'its devices'}")
    unknown = fields.keys() - {"name", "devices", "stages", "units", "sizes", *_INTEGERS}
    if unknown:
        raise ScheduleError(f"the {form} of a schedule has {', '.join(sorted(map(repr, unknown)))[:200]}, unknown here")
    return {**fields, "devices": tuple(tuple(row) for row in fields["devices"])}
