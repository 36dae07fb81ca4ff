"""The pictures of a report about the whole job: parts of a step, ranks beside each other, experts, a timeline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from launch.report_timeline import Bar, Timeline
from launch.step_times import PARTS

COLOURS = {
    "compute": "#2563a8", "bubble": "#b9c2cf", "exchange": "#d9652b", "data": "#8a5fb5", "update": "#2f8f5b",
    "checkpoint": "#d4a017", "other": "#e3e6ea",
}  # fmt: skip
_MOST_LINES = 16
_EXPERT = re.compile(r"moe/layer(\d+)/expert_(\d+)")


def draw_parts(axes: Axes, lines: Sequence[Mapping[str, float]]) -> None:
    """Stack what each part takes of every step, mean over ranks; what is left of the step is `other`."""
    steps = np.array([line["step"] for line in lines], dtype=float)
    rows = {name: np.array([line.get(f"seconds.{name}", 0.0) for line in lines]) for name in PARTS}
    whole = np.array([line["seconds"] for line in lines])
    rows["other"] = np.clip(whole - sum(rows.values()), 0, None)
    bottom = np.zeros(len(steps))
    for name in COLOURS:
        if rows[name].any():
            axes.bar(steps, rows[name], bottom=bottom, width=1.0, color=COLOURS[name], label=name, linewidth=0)
            bottom = bottom + rows[name]
    axes.set_ylabel("s")
    axes.set_xlabel("step")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2), fontsize=8)


def draw_ranks(axes: Axes, lines: Sequence[Mapping[str, float]], rows: Sequence[Sequence[float]], unit: str) -> None:
    """Draw a number of every rank over the steps; of many ranks the least, the mean and the most."""
    steps = np.array([line["step"] for line in lines], dtype=float)
    # A job may go on with another number of ranks than it began with: who was not there has no line.
    table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    if table.shape[1] <= _MOST_LINES:
        for rank in range(table.shape[1]):
            axes.plot(steps, table[:, rank], linewidth=1.1, clip_on=False, label=f"rank {rank}")
    else:
        axes.fill_between(
            steps, np.nanmin(table, 1), np.nanmax(table, 1), color=COLOURS["bubble"], label="least to most"
        )
        axes.plot(steps, np.nanmean(table, 1), color=COLOURS["compute"], label="mean")
    axes.set_ylim(0, 1.08 * np.nanmax(table, initial=0) or 1)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.legend(fontsize=8, ncols=4)


def draw_straggler(axes: Axes, lines: Sequence[Mapping[str, float]]) -> None:
    """Draw the slowest rank's computing over the mean."""
    values = np.array([line["straggler"] for line in lines])
    axes.plot([line["step"] for line in lines], values, color=COLOURS["exchange"], linewidth=1.2)
    axes.axhline(1, color=COLOURS["bubble"], linestyle=":")
    axes.set_ylim(0.95, max(1.1, 1.05 * float(values.max(initial=1))))
    axes.set_xlabel("step")


def has_experts(line: Mapping[str, float]) -> bool:
    """Return whether a step counted what experts got."""
    return any(_EXPERT.fullmatch(name) for name in line)


def draw_experts(axes: Axes, lines: Sequence[Mapping[str, float]]) -> None:
    """Draw the share of each expert of each layer, mean over all steps, as a table of colours; even is 1."""
    found: dict[tuple[int, int], list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if (match := _EXPERT.fullmatch(name)) is not None:
                found.setdefault((int(match[1]), int(match[2])), []).append(value)
    layers, experts = (1 + max(key[i] for key in found) for i in (0, 1))
    table = np.full((layers, experts), np.nan)
    for (layer, expert), values in found.items():
        table[layer, expert] = experts * sum(values) / len(values)
    drawn = axes.imshow(table, cmap="viridis", aspect="auto", vmin=0, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, experts, max(1, experts // 8)))
    axes.set_yticks(range(0, layers, max(1, layers // 8)))
    axes.figure.colorbar(drawn, ax=axes, label="load, 1 is even")


def draw_timeline(axes: Axes, timeline: Timeline) -> None:
    """Draw a row a rank: above what was measured, below, paler, what was predicted."""
    ranks = timeline.ranks[:_MOST_LINES]
    for bars, shift, alpha in ((timeline.measured, 0.05, 1.0), (timeline.predicted, 0.5, 0.45)):
        for backward, color in ((False, COLOURS["compute"]), (True, COLOURS["update"])):
            _rows(axes, [bar for bar in bars if bar.backward == backward], ranks, shift, alpha=alpha, color=color)
    axes.set_yticks([row + 0.45 for row in range(len(ranks))], [f"rank {rank}" for rank in ranks])
    axes.set_ylim(len(ranks), 0)
    axes.set_xlabel("s")
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")


def _rows(axes: Axes, bars: Sequence[Bar], ranks: Sequence[int], shift: float, *, alpha: float, color: str) -> None:
    for row, rank in enumerate(ranks):
        mine = [(bar.start_s, bar.end_s - bar.start_s) for bar in bars if bar.rank == rank]
        if mine:
            axes.broken_barh(
                mine, (row + shift, 0.4), color=color, alpha=alpha, linewidth=0.3, edgecolor="white"
            )  # fmt: skip
