"""What the commands of `pipeline.cli` print: tables for people, JSON for programs, a bar while they wait."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.costs import Costs
from pipeline.result import Result


def unit_of(costs: Costs | None) -> str:
    """The unit of times: seconds where costs were given, else none that has a name."""
    return "units" if costs is None else "s"


def write(path: Path, text: str) -> None:
    """Write a file, or say why not and end with bad input."""
    try:
        path.write_text(text)
    except OSError as e:
        typer.echo(f"error: cannot write {path}: {e.strerror}", err=True)
        raise typer.Exit(2) from e


def print_results(results: Sequence[Result], unit: str, *, compared: bool = False) -> None:
    """Print simulations as a table, best first; `compared` to the first."""
    shares = ("useful", "bubble", "fill", "switch", "drain", "imbalance", "transfer")
    table = Table("schedule", f"makespan ({unit})", *(["of best"] * compared), *shares, "peak bytes", box=None)
    for r in results:
        b, best = r.bubble, results[0].makespan_s
        relative = [f"{best / r.makespan_s if best else 1:.3f}"] * compared
        percent = (r.useful, b.total, b.fill, b.switch, b.drain, b.imbalance, b.transfer)
        cells = [f"{100 * share:.2f}%" for share in percent]
        table.add_row(r.name, f"{r.makespan_s:.6g}", *relative, *cells, f"{max(r.peak_bytes):,.0f}")
    Console(width=140).print(table)


def print_path(result: Result) -> None:
    """Print the beginning of the critical path."""
    path = result.critical_path
    steps = " ".join(f"{s.action.label}@{s.device}" for s in path[:12])
    typer.echo(f"critical path: {steps}{' ...' * (len(path) > 12)}")


def print_json(value: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a bar without an end, and the seconds, on the terminal's error output, if it is one."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        bar.add_task(what, total=None)
        yield
