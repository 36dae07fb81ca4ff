"""A run as one self-contained HTML page: loss, throughput, where time goes, ranks, lengths, memory, settings.

    python -m launch.report runs/smollm2                     writes runs/smollm2/report.html
    python -m launch.report runs/smollm2 --output page.html

Works at any time: of a run that is under way or was stopped, it shows what there is. Exit codes: 0 well, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.errors import EXIT_WELL, KNOWN_ERRORS, FolderError, as_program, report_error
from launch.files import RunFolder, write_lines
from launch.metrics import read_metrics
from launch.report_page import Page
from launch.report_plots import plots
from launch.report_timeline import Timeline, read_timeline
from launch.summary import summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a run folder; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="the folder of a run, as in run.folder")
    parser.add_argument("--output", type=Path, help="where to write; by default report.html in that folder")
    args = parser.parse_args(argv)
    try:
        print(write_report(RunFolder(args.folder), args.output))
    except KNOWN_ERRORS as error:
        return report_error(0, error)
    return EXIT_WELL


def write_report(folder: RunFolder, output: Path | None = None, *, summary: Mapping[str, Any] | None = None) -> Path:
    """Write the report of a run, at once; return where. Raises FolderError when there is no run, or no room.

    `summary` is what summary.json will say, of a run that has none yet.
    """
    target = folder.report if output is None else output
    page = make_page(
        read_metrics(folder.metrics),
        name=folder.path.name,
        settings=_read(folder.config),
        facts=_read(folder.facts),
        summary=_read(folder.summary) if summary is None else summary,
        timeline=read_timeline(folder.trace),
    )
    if page is None:
        raise FolderError(
            f"{folder.path} has no step in metrics.jsonl; give the folder of a run (run.folder) that has trained"
        )
    try:
        write_lines(target, [page.html()])
    except OSError as error:
        raise FolderError(f"the report cannot be written to {target}: {error}") from error
    return target


def make_page(
    lines: Sequence[dict[str, Any]],
    *,
    name: str,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    summary: Mapping[str, Any],
    timeline: Timeline | None = None,
) -> Page | None:
    """Return the report of a run, None without a step. Pure.

    `settings`, `facts` and `summary` are the run's config.json, job.json and summary.json, {} where there is none: a
    run that is not finished has no summary, and what its steps tell is computed.
    """
    if not lines:
        return None
    steps = max(line["step"] for line in lines)
    if summary.get("steps") != steps:
        summary = _so_far(lines, steps)
    chunk_tokens = settings.get("chunks", {}).get("chunk_tokens")
    return Page(
        title=name,
        lead=_lead(steps, settings, facts),
        tiles=_tiles(lines, summary),
        plots=plots(lines, facts, chunk_tokens=chunk_tokens, timeline=timeline),
        tables={"Summary": summary, "Data and machine": _described(facts), "Settings": _dotted(settings)},
    )


def _so_far(lines: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    peak = max((line.get("peak_bytes", 0) for line in lines), default=0)
    found = summarize(lines, steps=steps, resumed_from=None, peak_memory_bytes=peak, checkpoint=Path(), model=Path())
    return {key: value for key, value in found.items() if key not in ("resumed_from", "checkpoint", "model")}


def _lead(steps: int, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    sentences, total = [], facts.get("total_steps")
    if facts:
        model = settings.get("model", {})
        named = f", from {model['path']}" if model.get("path") else ""
        sentences.append(
            f"{facts['model']} of {facts['parameters']:,} parameters{named}, on {facts['world_size']} x "
            f"{facts['device']}; {facts['lengths']['sequences']:,} samples of {facts['lengths']['tokens']:,} tokens, "
            f"{facts['held_out']:,} more held out."
        )
    if total is not None and steps < total:
        sentences.append(f"Not finished: {steps} of {total} steps.")
    return sentences


def _tiles(lines: Sequence[dict[str, Any]], summary: Mapping[str, Any]) -> dict[str, str]:
    def change(first: float | None, last: float | None) -> str | None:
        return None if first is None or last is None else f"{first:.3f} → {last:.3f}"

    speed, fill, peak = (summary.get(key) for key in ("tokens_per_s", "fill", "peak_memory_bytes"))
    values = {
        "loss, first and last step": change(summary.get("loss_first"), summary.get("loss_last")),
        "held-out loss": change(summary.get("eval_loss_first"), summary.get("eval_loss_last")),
        "tokens trained": f"{summary.get('tokens', 0):,}",
        "tokens/s": f"{speed:,.0f}" if speed else None,
        "fill": f"{fill:.1%}" if fill else None,
        "peak memory of a rank": f"{peak / 2**30:.2f} GiB" if peak else None,
        "time in steps": _duration(sum(line.get("seconds", 0) for line in lines)),
    }
    return {name: value for name, value in values.items() if value is not None}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _described(facts: Mapping[str, Any]) -> dict[str, Any]:
    rows = {key: value for key, value in facts.items() if key not in ("lengths", "versions", "notes")}
    lengths = facts.get("lengths", {})
    rows |= {f"sequence length, p{name}": value for name, value in lengths.get("percentiles", {}).items()}
    rows |= {"sequence length, longest": lengths["longest"]} if lengths else {}
    rows |= {"left out": " ".join(f"{note.rstrip('.')}." for note in facts["notes"])} if facts.get("notes") else {}
    return rows | {f"version of {name}": value for name, value in facts.get("versions", {}).items()}


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key if inner is None else f"{key}.{inner}": value
        for key, section in settings.items()
        for inner, value in (section.items() if isinstance(section, dict) else [(None, section)])
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    as_program(main)
