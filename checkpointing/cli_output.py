"""What the `checkpoint` command prints: text for people, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

# Names are anything, and not to be broken where nobody is looking.
_console = Console(
    highlight=False, soft_wrap=True, markup=False, emoji=False, width=None if sys.stdout.isatty() else 1000
)


class Bars:
    """Progress bars on stderr, for work that may be long."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def bytes(self, what: str, total: int | None) -> Callable[[int], None]:
        """Return a function that is told of bytes."""
        return self._begin(what, total, unit="bytes")

    def names(self, what: str, names: Collection[str]) -> Callable[[str], None]:
        """Return a function that is told of names."""
        step = self._begin(what, len(names), unit="names")
        return lambda _: step(1)

    def _begin(self, what: str, total: int | None, *, unit: str) -> Callable[[int], None]:
        if self._progress is None:
            return lambda _: None
        progress, task = self._progress, self._progress.add_task(what, total=total, unit=unit)
        return lambda count: progress.update(task, advance=count)


class _Done(ProgressColumn):
    """How far a bar is: bytes with their speed, or names."""

    def __init__(self) -> None:
        super().__init__()
        self._size, self._speed = DownloadColumn(), TransferSpeedColumn()

    def render(self, task: Task) -> Text:
        """Return the text behind a bar."""
        if task.fields["unit"] == "bytes":
            return Text(" ").join((self._size.render(task), self._speed.render(task)))
        return Text(f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}")


@contextmanager
def progress(quiet: bool) -> Iterator[Bars]:
    """Show bars while the work goes on, when a person is watching.

    What libraries print meanwhile (DeepSpeed, when it is imported) goes to stderr: stdout is for what was asked.
    """
    with redirect_stdout(sys.stderr):
        if quiet or not sys.stderr.isatty():
            yield Bars(None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), _Done())
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            yield Bars(shown)


def show_steps(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print the list of a run's checkpoints."""
    if as_json:
        _json(rows)
        return
    table = _table("step", "size", "tensors", "ranks", "run", "")
    for row in rows:
        if row["ok"]:
            cells = (size_text(row["bytes"]), str(row["tensors"]), str(row["world_size"]), row["run_id"][:8], "")
        else:
            cells = ("", "", "", "", row["reason"])
        table.add_row(str(row["step"]), *cells)
    _console.print(table if rows else "no checkpoints")


def show_checkpoint(found: Mapping[str, Any], as_json: bool) -> None:
    """Print one checkpoint."""
    if as_json:
        _json(found)
        return
    table = _table("tensor", "dtype", "shape", "size", "shards")
    for one in found["tensors"]:
        table.add_row(one["name"], one["dtype"], str(one["shape"]), size_text(one["bytes"]), _shards(one["shards"]))
    for name, first in found["aliases"].items():
        table.add_row(name, "", "", "", f"is {first}")
    _console.print(table)
    shown, there = len(found["tensors"]), found["num_tensors"]
    part = "" if shown == there else f"{shown} of "
    size = size_text(sum(one["bytes"] for one in found["tensors"]))
    if "format" in found:
        _console.print(f"a {found['format']} checkpoint: {part}{_count(there, 'tensor')}, {size}")
    else:
        total = size_text(sum(file["bytes"] for file in found["files"]))
        _console.print(
            f"step {found['step']} of run {found['run_id'][:8]}: {part}{_count(there, 'tensor')}, "
            f"{f'{size}, of ' if part else ''}{total} in {_count(len(found['files']), 'file')} of "
            f"{_count(found['world_size'], 'rank')}"
        )
    for name, value in found["values"].items():
        text = json.dumps(value, default=str)
        _console.print(f"{name} = {text if len(text) <= 100 else text[:97] + '...'}")


def show_damages(found: Mapping[int, Sequence[Any]], as_json: bool) -> None:
    """Print what verify has found."""
    if as_json:
        _json(
            [{"step": step, "ok": not found[step], "damages": [_plain(one) for one in found[step]]} for step in found]
        )
        return
    for step, damages in found.items():
        if not damages:
            print(f"step {step}: every byte is what was saved")
        for damage in damages:
            print(damage)


def show_differences(found: Sequence[Any], as_json: bool) -> None:
    """Print what diff has found."""
    if as_json:
        _json([asdict(one) for one in found])
        return
    if not found:
        print("no differences")
        return
    table = _table("name", "differs in", "A", "B", "max abs", "max rel", "elements")
    for one in found:
        numbers = (
            "" if one.max_abs is None else f"{one.max_abs:.3g}",
            "" if one.max_rel is None else f"{one.max_rel:.3g}",
        )
        sides = ("" if side is None and one.kind != "value" else _short(side) for side in (one.a, one.b))
        table.add_row(one.name, one.kind, *sides, *numbers, "" if one.different is None else str(one.different))
    _console.print(table)


def show_findings(findings: Sequence[Any], as_json: bool) -> None:
    """Print what doctor has found."""
    if as_json:
        _json([asdict(one) for one in findings])
        return
    for one in findings:
        print(f"{one.level:8} {one.what}")


def show_done(what: Mapping[str, Any], as_json: bool, *lines: str) -> None:
    """Print what was done: a record for programs, lines for people."""
    if as_json:
        _json(what)
        return
    for line in lines:
        print(line)


def size_text(num_bytes: int) -> str:
    """Return bytes as people read them: `1.6 GB`."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shards(shards: Sequence[Mapping[str, Any]]) -> str:
    files = [shard["file"].removesuffix(".safetensors") for shard in shards]
    if not files:
        return ""
    return files[0] if len(files) == 1 else f"{len(files)}: {', '.join(files[:4])}{', ...' * (len(files) > 4)}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else {"reason": str(value)}


def _json(value: Any) -> None:
    print(json.dumps(_strict(value), indent=2, default=str, allow_nan=False))


def _strict(value: Any) -> Any:
    """Return a value with text for floats that are not finite: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
