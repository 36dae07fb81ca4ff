"""What a finished run amounts to: computed from its metrics, printed, and kept as summary.json."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def summarize(
    lines: Sequence[dict[str, Any]],
    *,
    steps: int,
    resumed_from: int | None,
    peak_memory_bytes: int,
    checkpoint: Path | None,
    model: Path,
) -> dict[str, Any]:
    """Return the summary of a run from the lines of its metrics.jsonl, kills and resumes included. Pure."""
    trained = [line for line in lines if "loss" in line]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    tokens = sum(line["tokens"] for line in trained)
    room = math.fsum(line["tokens"] / line["fill"] for line in trained)
    seconds = math.fsum(line["seconds"] for line in trained)
    return {
        "loss_first": trained[0]["loss"] if trained else None,
        "loss_last": trained[-1]["loss"] if trained else None,
        "eval_loss_first": evaluated[0] if evaluated else None,
        "eval_loss_last": evaluated[-1] if evaluated else None,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds else None,
        "fill": tokens / room if room else None,
        "split_token_share": sum(line["split_tokens"] for line in trained) / tokens if tokens else None,
        "longest_sequence": max((line["longest"] for line in trained), default=0),
        "peak_memory_bytes": peak_memory_bytes,
        "steps": steps,
        "resumed_from": resumed_from,
        "checkpoint": str(checkpoint),
        "model": str(model),
    }


def summed_up(path: Path, step: int) -> bool:
    """Return whether this summary is that of a run of so many steps; one of fewer is left by a run that went on."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["steps"] == step
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary as a table."""
    table = Table(title="summary", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary.items():
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def peak_resident_bytes() -> int:
    """Return the largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
