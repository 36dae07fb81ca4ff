"""From rows to tables, claims and a plot; medians with a confidence interval from order statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.claims import Claim

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
    tables = {
        "blocked": _blocked,
        "durable": _durable,
        "train": _train,
        "fence": _fence,
        "small": _small,
        "load": _load,
    }
    for part, make in tables.items():
        for state in dict.fromkeys(row["state"] for row in rows if row["part"] == part):
            found = [row for row in rows if row["part"] == part and row["state"] == state]
            print(f"\n{part}: {state}\n")
            print("\n".join(f"| {' | '.join(line)} |" for line in make(found)))


def _by(rows: Rows, *fields: str) -> dict[tuple[Any, ...], Rows]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in fields)].append(row)
    return dict(groups)


def _mid(rows: Rows, field: str | Callable[[dict[str, Any]], float]) -> float:
    return median(field(row) if callable(field) else row[field] for row in rows)


def _head(*names: str) -> list[tuple[str, ...]]:
    return [names, ("---",) * len(names)]


def taken(row: dict[str, Any]) -> float:
    """Return the seconds a save took from training, in one pair of windows."""
    return row["with_s"] - row["base_s"]


def _blocked(rows: Rows) -> Iterable[Sequence[str]]:
    names = ("way", "pairs", "blocked, ms", "95% CI", "save + fence, ms", "call, ms", "written after, s", "in window")
    lines: list[Sequence[str]] = [*_head(*names)]
    for (way,), own in _by(rows, "way").items():
        low, high = interval([taken(row) for row in own])
        inside = sum(row["in_window"] for row in own)
        lines.append(
            (
                way, str(len(own)), f"{_mid(own, taken) * 1e3:.0f}", f"{low * 1e3:.0f} to {high * 1e3:.0f}",
                f"{_mid(own, 'stop_s') * 1e3:.1f}", f"{_mid(own, 'call_s') * 1e3:.1f}", f"{_mid(own, 'written_s'):.2f}",
                f"{inside}/{len(own)}",
            )
        )  # fmt: skip
    return lines


def _durable(rows: Rows) -> Iterable[Sequence[str]]:
    names = ("way", "rounds", "durable, GB/s", "of raw", "perceived, GB/s", "CPU s/GB", "peak, MB")
    lines: list[Sequence[str]] = [*_head(*names)]
    for (way,), own in _by(rows, "way").items():
        size = own[0]["num_bytes"] / 1e9
        ratio = ratios(rows, "raw", way, "durable_s", ("sitting", "round"))
        lines.append(
            (
                way, str(len(own)), f"{size / _mid(own, 'durable_s'):.2f}", f"{median(ratio):.2f}",
                f"{size / _mid(own, 'call_s'):.2f}", f"{_mid(own, 'cpu_s') / size:.2f}",
                f"{_mid(own, 'peak_bytes') / 1e6:.0f}",
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
    for (way, busy, kind), own in _by(rows, "way", "busy", "kind").items():
        times = [row["step_s"] for row in own]
        skipped = sum(group[0]["skipped"] for group in _by(own, "sitting", "round").values())
        lines.append(
            (
                way, busy, str(len(own)), kind, f"{median(times):.3f}", f"{np.percentile(times, 90):.3f}",
                f"{max(times):.3f}", f"{_mid(own, 'save_s') * 1e3:.1f}", f"{_mid(own, 'fence_s') * 1e3:.1f}",
                str(skipped) if kind == "with" else "-",
            )
        )  # fmt: skip
    return lines


def _fence(rows: Rows) -> Iterable[Sequence[str]]:
    lines: list[Sequence[str]] = [
        *_head("buffers", "fence after, of the durable time", "fence waits, ms", "durable, s", "rounds")
    ]
    for (way, share), own in sorted(_by(rows, "way", "share").items()):
        waits, lasts = f"{_mid(own, 'fence_s') * 1e3:.0f}", f"{_mid(own, 'durable_s'):.2f}"
        lines.append((way, f"{share:.0%}", waits, lasts, str(len(own))))
    return lines


def _small(rows: Rows) -> Iterable[Sequence[str]]:
    lines: list[Sequence[str]] = [*_head("way", "save", "rounds", "saved, ms", "loaded, ms")]
    for (way, call), own in _by(rows, "way", "call").items():
        lines.append((way, call, str(len(own)), f"{_mid(own, 'save_s') * 1e3:.0f}", f"{_mid(own, 'load_s') * 1e3:.0f}"))
    return lines


def _load(rows: Rows) -> Iterable[Sequence[str]]:
    lines: list[Sequence[str]] = [*_head("way", "rounds", "cold, GB/s", "of raw", "warm, GB/s", "CPU s/GB", "peak, MB")]
    cold = [row for row in rows if row["cold"]]
    for (way,), own in _by(cold, "way").items():
        warm = [row for row in rows if row["way"] == way and not row["cold"]]
        size = own[0]["num_bytes"] / 1e9
        lines.append(
            (
                way, str(len(own)), f"{size / _mid(own, 'load_s'):.2f}",
                f"{median(ratios(cold, 'raw', way, 'load_s', ('sitting', 'round'))):.2f}",
                f"{size / _mid(warm, 'load_s'):.2f}" if warm else "-", f"{_mid(own, 'cpu_s') / size:.2f}",
                f"{_mid(own, 'peak_bytes') / 1e6:.0f}",
            )
        )  # fmt: skip
    return lines


def ratios(rows: Rows, one: str, other: str, field: str, pair: tuple[str, ...]) -> list[float]:
    """Return, for each pair of rows of the same round, how many times as long the first took as the second."""
    found = _by(rows, "way", *pair)
    keys = [key[1:] for key in found if key[0] == one]
    both = [(found[one, *key][0], found[other, *key][0]) for key in keys if (other, *key) in found]
    return [a[field] / b[field] for a, b in both]


class _Claims:
    def __init__(self) -> None:
        self.all: list[Claim] = []

    def add(self, name: str, value: float, unit: str, target: str, bound: float | None, note: str) -> None:
        how, limit = target.split()
        met = value <= float(limit) if how == "<=" else value >= float(limit)
        self.all.append(Claim(name=name, value=value, unit=unit, target=target, bound=bound, met=met, note=note))


def claims_of(rows: Rows) -> list[Claim]:
    """Return what the rows show, for every target that they say something about."""
    claims = _Claims()
    for (part, state), found in _by(rows, "part", "state").items():
        CLAIMS[part](claims, found, state.split(" with")[0])
    return claims.all


def _claim_blocked(claims: _Claims, rows: Rows, state: str) -> None:
    ways = {way: own for (way,), own in _by(rows, "way").items()}
    if "ours" not in ways:
        return
    ours = [taken(row) for row in ways["ours"]]
    low, high = interval(ours)
    mine, stop = median(ours), _mid(ways["ours"], "stop_s")
    note = f"{len(ours)} pairs; ours {mine * 1e3:.0f} ms, 95% CI {low * 1e3:.0f} to {high * 1e3:.0f}"
    if "torch.save" in ways:
        theirs = _mid(ways["torch.save"], taken)
        text = f"{note}; torch.save {theirs * 1e3:.0f} ms; upper end of the interval: {high / theirs:.3f}"
        claims.add(f"{state}: blocked, of torch.save's", mine / theirs, "", "<= 0.05", None, text)
        call = _mid(ways["torch.save"], "stop_s")
        text = f"save() + fence {stop * 1e3:.1f} ms, torch.save {call * 1e3:.0f} ms; steps beside it not counted"
        claims.add(f"{state}: stopped, of torch.save's", stop / call, "", "<= 0.0208", None, text)
    peers = {way: _mid(own, taken) for way, own in ways.items() if way not in ("ours", "torch.save")}
    if peers:
        best = min(peers, key=lambda way: peers[way])
        text = f"{note}; {best} {peers[best] * 1e3:.0f} ms"
        claims.add(f"{state}: blocked, of the best peer's", mine / peers[best], "", "<= 0.25", None, text)


def _claim_durable(claims: _Claims, rows: Rows, state: str) -> None:
    ways = {way: own for (way,), own in _by(rows, "way").items()}
    pair = ("sitting", "round")
    if "ours" in ways:
        found = ratios(rows, "raw", "ours", "durable_s", pair)
        low, high = interval(found)
        note = f"{len(found)} paired rounds, 95% CI {low:.2f} to {high:.2f}"
        claims.add(f"{state}: durable, of the raw limit", median(found), "x", ">= 0.9", 1.0, note)
        own = ways["ours"]
        share = _mid(own, lambda row: row["commit_s"] / row["durable_s"])
        note = f"{_mid(own, 'commit_s') * 1e3:.1f} ms of {_mid(own, 'durable_s'):.2f} s"
        claims.add(f"{state}: manifest and commit, of the durable time", share, "", "<= 0.03", None, note)
        hashing = _mid(own, lambda row: row["hash_cpu_s"] / (row["num_bytes"] / 2 / 1e9))
        note = "xxh3 of what was copied just before; the bound is one core at 32 GB/s"
        claims.add(f"{state}: hashing", hashing, "CPU s/GB", "<= 0.06", 1 / 32, note)
    found = ratios(rows, "DCP", "ours", "durable_s", pair)
    if found:
        bound = median(ratios(rows, "DCP", "raw", "durable_s", pair))
        note = f"{len(found)} paired rounds; the bound is the raw writer's"
        claims.add(f"{state}: durable, over DCP with fsync", median(found), "x", ">= 2", bound, note)


def _claim_train(claims: _Claims, rows: Rows, state: str) -> None:
    for (way, busy), own in _by(rows, "way", "busy").items():
        if way != "ours":
            continue
        times = {kind: [row["step_s"] for row in found] for (kind,), found in _by(own, "kind").items()}
        plain, saved = median(times["without"]), times["with"]
        note = (
            f"{len(saved)} steps, policy {busy}: p90 {np.percentile(saved, 90) / plain:.2f}x, worst "
            f"{max(saved) / plain:.2f}x; without saves p90 {np.percentile(times['without'], 90) / plain:.2f}x"
        )
        claims.add(f"{state}: a step with a save", median(saved) / plain, "x", "<= 1.10", 1.0, note)


def _claim_small(claims: _Claims, rows: Rows, state: str) -> None:
    pair = ("call", "sitting", "round")
    for call, target in (("first", ">= 10"), ("third", ">= 50")):
        found = ratios([row for row in rows if row["call"] == call], "DCP", "ours", "save_s", pair)
        if found:
            kind = "plan cached" if call == "third" else "no plan"
            claims.add(f"{state}: saved, over DCP, {kind}", median(found), "x", target, None, f"{len(found)} rounds")
    found = ratios(rows, "DCP", "ours", "load_s", pair)
    if found:
        claims.add(f"{state}: loaded, over DCP", median(found), "x", ">= 15", None, f"{len(found)} loads")


def _claim_load(claims: _Claims, rows: Rows, state: str) -> None:
    cold = [row for row in rows if row["cold"]]
    for other, target in (("raw", ">= 0.85"), ("DCP", ">= 2")):
        found = ratios(cold, other, "ours", "load_s", ("sitting", "round"))
        if found:
            name = "of the raw limit" if other == "raw" else "over DCP"
            bound = 1.0 if other == "raw" else median(ratios(cold, other, "raw", "load_s", ("sitting", "round")))
            text = f"verified; {len(found)} paired rounds"
            claims.add(f"{state}: cold load, {name}", median(found), "x", target, bound, text)


TABLES: dict[str, Callable[[Rows], Iterable[Sequence[str]]]] = {
    "blocked": _blocked,
    "durable": _durable,
    "train": _train,
    "fence": _fence,
    "small": _small,
    "load": _load,
}
CLAIMS: dict[str, Callable[[_Claims, Rows, str], None]] = {
    "blocked": _claim_blocked,
    "durable": _claim_durable,
    "train": _claim_train,
    "fence": lambda claims, rows, state: None,
    "small": _claim_small,
    "load": _claim_load,
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
        own = _by([row for row in rows if row["part"] == part and row["state"] == state], "way")
        if part == "blocked":
            values = [max(_mid(found, taken), 1e-3) * 1e3 for found in own.values()]
            axis.set_xscale("log")
        else:
            values = [found[0]["num_bytes"] / 1e9 / _mid(found, "durable_s") for found in own.values()]
        axis.barh([way for (way,) in own], values)
        axis.invert_yaxis()
        axis.set_xlabel(kinds[part])
        axis.set_title(state, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
