"""The pictures of a report, from the lines of metrics.jsonl. Each is an SVG that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launch.report_parts import (
    draw_experts,
    draw_parts,
    draw_ranks,
    draw_straggler,
    draw_timeline,
    has_experts,
)
from launch.report_timeline import Timeline

Line = Mapping[str, Any]
_FEWEST = 3
"""Steps of which a median says something."""
BLUE, ORANGE, GREY, GREEN = "#2563a8", "#d9652b", "#8a8f98", "#2f8f5b"
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b6bac2",
    "axes.grid": True, "grid.color": "#e6e8ec", "axes.axisbelow": True, "legend.frameon": False,
    "svg.hashsalt": "report", "xtick.color": "#555b66", "ytick.color": "#555b66", "axes.labelcolor": "#333842",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture, with what it shows in words."""

    name: str
    title: str
    text: str
    svg: bytes


def plots(
    lines: Sequence[Line], facts: Mapping[str, Any], *, chunk_tokens: int | None, timeline: Timeline | None = None
) -> list[Plot]:
    """Return the pictures that this run has numbers for; steps without a number are left out of a picture."""
    trained = [line for line in lines if "loss" in line]
    return [plot for plot in (*_of_training(lines, trained, facts, chunk_tokens), *_of_job(trained, timeline)) if plot]


def _of_training(
    lines: Sequence[Line], trained: Sequence[Line], facts: Mapping[str, Any], chunk_tokens: int | None
) -> list[Plot | None]:
    return [
        _plot("loss", "Loss", "Mean over the targets of a step, before the step; held out: of samples never trained.",
              lambda axes: _loss(axes, lines, trained), trained or _with(lines, "eval_loss")),
        _plot("lr", "Learning rate", "Of each step.", lambda axes: _curve(axes, trained, "lr", ""), trained),
        _plot("grad_norm", "Gradient norm", "Of the whole model, before clipping.",
              lambda axes: _curve(axes, trained, "grad_norm", ""), trained),
        _plot("throughput", "Throughput", "Tokens trained per second, over all ranks, waiting for data included.",
              lambda axes: _curve(axes, trained, "tokens_per_s", "tokens/s", zero=True), trained),
        _plot("seconds", "Step time",
              "Seconds of a step against its tokens; longer sequences cost more attention." + _beside_text(trained),
              lambda axes: _seconds(axes, trained), trained),
        _plot("fill", "Fill", "Tokens per token of room in the chunks of a step.",
              lambda axes: _fill(axes, trained), trained),
        _plot("lengths", "Sequence lengths", "Training samples by their tokens, and where the tokens are.",
              lambda axes: _lengths(axes, facts["lengths"], chunk_tokens), facts.get("lengths")),
        _plot("memory", "Memory against sequence length",
              "Peak of a step, on the rank that used most, against the longest sequence of the step.",
              lambda axes: _memory(axes, _with(trained, "peak_bytes"), chunk_tokens), _with(trained, "peak_bytes")),
    ]  # fmt: skip


def _of_job(trained: Sequence[Line], timeline: Timeline | None) -> list[Plot | None]:
    timed, ranked, routed = _with(trained, "seconds.compute"), _with(trained, "ranks"), [*filter(has_experts, trained)]
    counted = [line for line in ranked if any(line["ranks"]["peak_bytes"])]
    how = "" if timeline is None or not timeline.predicted else f" Below it, paler: {timeline.how}."
    return [
        _plot("parts", "Where the time goes",
              "Mean over ranks. Exchange: what communication adds. Checkpoint: what a save makes training wait.",
              lambda axes: draw_parts(axes, timed), timed),
        _plot("timeline", "A step in time",
              f"Forwards blue, backwards green, of step {timeline.step if timeline else 0}.{how}",
              lambda axes: draw_timeline(axes, timeline) if timeline else None, timeline),
        _plot("straggler", "Stragglers", "Computing of the slowest rank over the mean; 1 is even.",
              lambda axes: draw_straggler(axes, timed), timed),
        _plot("compute_ranks", "Computing, by rank", "Seconds of each step.",
              lambda axes: draw_ranks(axes, ranked, [line["ranks"]["compute"] for line in ranked], "s"), ranked),
        _plot("memory_ranks", "Memory, by rank", "Peak of each step.",
              lambda axes: draw_ranks(axes, counted, _gib(counted), "GiB"), counted),
        _plot("experts", "Expert load", "Share of the tokens that each expert got, mean over the run.",
              lambda axes: draw_experts(axes, routed), routed),
    ]  # fmt: skip


def _gib(lines: Sequence[Line]) -> list[list[float]]:
    return [[value / 2**30 for value in line["ranks"]["peak_bytes"]] for line in lines]


def _plot(name: str, title: str, text: str, draw: Callable[[Axes], None], data: Any) -> Plot | None:
    if not data:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        _finish(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name, title, text, buffer.getvalue())


def _with(lines: Sequence[Line], key: str) -> list[Line]:
    return [line for line in lines if line.get(key) is not None]


def _values(lines: Sequence[Line], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], dtype=float)


def _loss(axes: Axes, lines: Sequence[Line], trained: Sequence[Line]) -> None:
    held_out = _with(lines, "eval_loss")
    if trained:
        axes.plot(_values(trained, "step"), _values(trained, "loss"), color=BLUE, linewidth=1.2, label="trained")
    if held_out:
        axes.plot(_values(held_out, "step"), _values(held_out, "eval_loss"), "o-", color=ORANGE, label="held out")
        axes.axhline(held_out[0]["eval_loss"], color=GREY, linestyle=":", label="held out, at first")
    axes.set_xlabel("step")
    axes.legend()


def _curve(axes: Axes, lines: Sequence[Line], key: str, unit: str, *, zero: bool = False) -> None:
    some = _with(lines, key)
    axes.plot(_values(some, "step"), _values(some, key), color=BLUE, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    if zero:
        _from_zero(axes, _values(some, key))


def _beside_text(trained: Sequence[Line]) -> str:
    found = beside_saves(trained)
    return "" if found is None else f" Beside a save that is being written, a token takes {found:.2f} times as long."


def beside_saves(trained: Sequence[Line]) -> float | None:
    """Return the seconds a token of the steps beside a save over those of the others; None with too few of either."""
    beside, alone = (
        [line["seconds"] / line["tokens"] for line in trained if line["tokens"] and _is_beside(line) is saving]
        for saving in (True, False)
    )
    if min(len(beside), len(alone)) < _FEWEST or not np.median(alone) > 0:
        return None
    return float(np.median(beside) / np.median(alone))


def _seconds(axes: Axes, trained: Sequence[Line]) -> None:
    for saving, color, label in ((False, BLUE, "alone"), (True, ORANGE, "beside a save")):
        some = [line for line in trained if _is_beside(line) is saving]
        axes.scatter(_values(some, "tokens"), _values(some, "seconds"), s=14, color=color, alpha=0.7, label=label)
    axes.set_xlabel("tokens of the step")
    axes.set_ylabel("s")
    axes.set_xlim(left=0)
    _from_zero(axes, _values(trained, "seconds"))
    if any(map(_is_beside, trained)):
        axes.legend()


def _is_beside(line: Line) -> bool:
    return bool(line.get("beside_save"))


def _fill(axes: Axes, lines: Sequence[Line]) -> None:
    axes.plot(_values(lines, "step"), 100 * _values(lines, "fill"), color=GREEN, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("%")
    axes.set_ylim(0, 102)


def _lengths(axes: Axes, lengths: Mapping[str, Any], chunk_tokens: int | None) -> None:
    bars = lengths["bars"]
    left = np.arange(len(bars))
    for shift, key, color in ((0.05, "sequences", BLUE), (0.5, "tokens", ORANGE)):
        axes.bar(left + shift, 100 * _values(bars, key) / lengths[key], width=0.43, align="edge", color=color,
                 label=f"% of the {key}")  # fmt: skip
    axes.set_xticks(np.arange(len(bars) + 1), [_short(bar["low"]) for bar in bars] + [_short(bars[-1]["high"])])
    if chunk_tokens is not None:
        place = np.log2(chunk_tokens / bars[0]["low"])  # bars are powers of two
        if 0 <= place <= len(bars):
            axes.axvline(place, color=GREY, linestyle=":", label=f"a chunk, {chunk_tokens}")
    axes.set_xlabel("tokens of a sequence")
    axes.legend()


def _memory(axes: Axes, lines: Sequence[Line], chunk_tokens: int | None) -> None:
    peaks = _values(lines, "peak_bytes") / 2**30
    axes.scatter(_values(lines, "longest"), peaks, s=14, color=BLUE, alpha=0.7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: _short(round(tokens)))
    _from_zero(axes, peaks)
    if chunk_tokens is not None:
        axes.axvline(chunk_tokens, color=GREY, linestyle=":", label=f"a chunk, {chunk_tokens}")
        axes.legend()
    axes.set_xlabel("tokens of the longest sequence")
    axes.set_ylabel("GiB")


def _finish(axes: Axes) -> None:
    """Mark whole steps only, and show a line of one point as a point."""
    if axes.get_xlabel() == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for line in axes.lines:
        if np.isfinite(np.asarray(line.get_ydata(), dtype=float)).sum() == 1:
            line.set_marker("o")


def _from_zero(axes: Axes, values: np.ndarray) -> None:
    axes.set_ylim(0, 1.08 * values.max(initial=0) or 1)


def _short(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else str(number)
