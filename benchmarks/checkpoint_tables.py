"""From rows to tables and a plot; medians with a confidence interval from the bootstrap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]


OTHERS = 0.05


def is_alone(row: dict[str, Any]) -> bool:
    """Return whether other processes took less than 5% of one core while a row was measured; only such rows count."""
    return row["others_s"] < max(OTHERS * row["span_s"], 0.03)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the median, by the bootstrap with a fixed seed."""
    found = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(found), (2000, len(found)))
    low, high = np.percentile(np.median(found[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def print_tables(rows: Rows) -> None:
    """Print one table a part and state."""
    for part, make in TABLES.items():
        for state in dict.fromkeys(row["state"] for row in rows if row["part"] == part):
            found = [row for row in rows if row["part"] == part and row["state"] == state]
            print(f"\n{part}: {state}\n")
            print("\n".join(f"| {' | '.join(line)} |" for line in make(found)))


def by(rows: Rows, *fields: str) -> dict[tuple[Any, ...], Rows]:
    """Return the rows that are alike in these fields, together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in fields)].append(row)
    return dict(groups)


def mid(rows: Rows, field: str | Callable[[dict[str, Any]], float]) -> float:
    """Return the median of a field, or of what a function makes of a row."""
    return median(field(row) if callable(field) else row[field] for row in rows)


def _head(*names: str) -> list[tuple[str, ...]]:
    return [names, ("---",) * len(names)]


def taken(row: dict[str, Any]) -> float:
    """Return the seconds a save took from training, in one pair of windows."""
    return row["with_s"] - row["base_s"]


def _blocked(rows: Rows) -> Iterable[Sequence[str]]:
    names = ("way", "pairs", "blocked, ms", "95% CI", "save + fence, ms", "call, ms", "written after, s", "in window")
    lines: list[Sequence[str]] = [*_head(*names)]
    for (way,), own in by(rows, "way").items():
        low, high = interval([taken(row) for row in own])
        inside = sum(row["in_window"] for row in own)
        lines.append(
            (
                way, str(len(own)), f"{mid(own, taken) * 1e3:.0f}", f"{low * 1e3:.0f} to {high * 1e3:.0f}",
                f"{mid(own, 'stop_s') * 1e3:.1f}", f"{mid(own, 'call_s') * 1e3:.1f}", f"{mid(own, 'written_s'):.2f}",
                f"{inside}/{len(own)}",
            )
        )  # fmt: skip
    return lines


def _durable(rows: Rows) -> Iterable[Sequence[str]]:
    names = ("way", "rounds", "durable, GB/s", "of raw", "perceived, GB/s", "CPU s/GB", "peak, MB")
    lines: list[Sequence[str]] = [*_head(*names)]
    for (way,), own in by(rows, "way").items():
        size = own[0]["num_bytes"] / 1e9
        ratio = ratios(rows, "raw", way, "durable_s", ("sitting", "round"))
        lines.append(
            (
                way, str(len(own)), f"{size / mid(own, 'durable_s'):.2f}", f"{median(ratio):.2f}",
                f"{size / mid(own, 'call_s'):.2f}", f"{mid(own, 'cpu_s') / size:.2f}",
                f"{mid(own, 'peak_bytes') / 1e6:.0f}",
            )
        )  # fmt: skip
    return lines


def _train(rows: Rows) -> Iterable[Sequence[str]]:
    names = (
        "way",
        "policy",
        "steps",
        "kind",
        "p50, s",
        "p90, s",
        "worst, s",
        "save p50, ms",
        "fence p50, ms",
        "skipped",
    )
    lines: list[Sequence[str]] = [*_head(*names)]
    for (way, busy, kind), own in by(rows, "way", "busy", "kind").items():
        times = [row["step_s"] for row in own]
        skipped = sum(group[0]["skipped"] for group in by(own, "sitting", "round").values())
        lines.append(
            (
                way, busy, str(len(own)), kind, f"{median(times):.3f}", f"{np.percentile(times, 90):.3f}",
                f"{max(times):.3f}", f"{mid(own, 'save_s') * 1e3:.1f}", f"{mid(own, 'fence_s') * 1e3:.1f}",
                str(skipped) if kind == "with" else "-",
            )
        )  # fmt: skip
    return lines


def _fence(rows: Rows) -> Iterable[Sequence[str]]:
    lines: list[Sequence[str]] = [
        *_head("buffers", "fence after, of the durable time", "fence waits, ms", "durable, s", "rounds")
    ]
    for (way, share), own in sorted(by(rows, "way", "share").items()):
        waits, lasts = f"{mid(own, 'fence_s') * 1e3:.0f}", f"{mid(own, 'durable_s'):.2f}"
        lines.append((way, f"{share:.0%}", waits, lasts, str(len(own))))
    return lines


def _small(rows: Rows) -> Iterable[Sequence[str]]:
    lines: list[Sequence[str]] = [*_head("way", "save", "rounds", "saved, ms", "loaded, ms")]
    for (way, call), own in by(rows, "way", "call").items():
        lines.append((way, call, str(len(own)), f"{mid(own, 'save_s') * 1e3:.0f}", f"{mid(own, 'load_s') * 1e3:.0f}"))
    return lines


def _load(rows: Rows) -> Iterable[Sequence[str]]:
    lines: list[Sequence[str]] = [*_head("way", "rounds", "cold, GB/s", "of raw", "warm, GB/s", "CPU s/GB", "peak, MB")]
    cold = [row for row in rows if row["cold"]]
    for (way,), own in by(cold, "way").items():
        warm = [row for row in rows if row["way"] == way and not row["cold"]]
        size = own[0]["num_bytes"] / 1e9
        lines.append(
            (
                way, str(len(own)), f"{size / mid(own, 'load_s'):.2f}",
                f"{median(ratios(cold, 'raw', way, 'load_s', ('sitting', 'round'))):.2f}",
                f"{size / mid(warm, 'load_s'):.2f}" if warm else "-", f"{mid(own, 'cpu_s') / size:.2f}",
                f"{mid(own, 'peak_bytes') / 1e6:.0f}",
            )
        )  # fmt: skip
    return lines


def ratios(rows: Rows, one: str, other: str, field: str, pair: tuple[str, ...]) -> list[float]:
    """Return, for each pair of rows of the same round, how many times as long the first took as the second."""
    found = by(rows, "way", *pair)
    keys = [key[1:] for key in found if key[0] == one]
    both = [(found[one, *key][0], found[other, *key][0]) for key in keys if (other, *key) in found]
    return [a[field] / b[field] for a, b in both]


TABLES: dict[str, Callable[[Rows], Iterable[Sequence[str]]]] = {
    "blocked": _blocked,
    "durable": _durable,
    "train": _train,
    "fence": _fence,
    "small": _small,
    "load": _load,
}


def plot(rows: Rows, path: Path) -> bool:
    """Draw blocked time and durable throughput a way. Returns whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"blocked": "blocked, ms (logarithmic)", "durable": "durable, GB/s"}
    present = [part for part in kinds if any(row["part"] == part for row in rows)]
    if not present:
        return False
    figure, axes = pyplot.subplots(1, len(present), figsize=(6 * len(present), 4), squeeze=False)
    for axis, part in zip(axes[0], present, strict=True):
        state = next(row["state"] for row in rows if row["part"] == part)
        own = by([row for row in rows if row["part"] == part and row["state"] == state], "way")
        if part == "blocked":
            values = [max(mid(found, taken), 1e-3) * 1e3 for found in own.values()]
            axis.set_xscale("log")
        else:
            values = [found[0]["num_bytes"] / 1e9 / mid(found, "durable_s") for found in own.values()]
        axis.barh([way for (way,) in own], values)
        axis.invert_yaxis()
        axis.set_xlabel(kinds[part])
        axis.set_title(state, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
