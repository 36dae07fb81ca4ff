"""Tables and claims of `benchmarks.job`, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim

Row = dict[str, Any]
FULL = "the job, everything on"
BARE, BEYOND_S = "DDP, ", 10.0
GAIN, OF_BOUND, OVERHEAD = 2.5, 0.9, 1.03
SAME_LOSS = 1e-3
"""Largest relative difference between two ways' losses of a step: fp32, sums in another order."""


def print_tables(rows: Sequence[Row]) -> None:
    """Print one table a part that has rows."""
    shown: dict[str, Callable[[Sequence[Row], str], Table]] = {
        "train": train_table, "scan": train_table, "features": features_table, "startup": startup_table,
    }  # fmt: skip
    for part, quick, mine in parts_of(rows):
        Console(width=150).print(shown[part](mine, f"{part}, quick" if quick else part))


def parts_of(rows: Sequence[Row]) -> list[tuple[str, bool, list[Row]]]:
    """Return (part, quick, rows) of each part."""

    def key(row: Row) -> tuple[str, bool]:
        return row["part"], row["quick"]

    return [(part, quick, list(mine)) for (part, quick), mine in groupby(sorted(rows, key=key), key)]


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by what stands under these names, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[name]) for name in names), []).append(row)
    return found


def table_of(title: str, *columns: str) -> Table:
    """Return an empty table; numbers stand right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return a median, and between what it lies."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rate(row: Row) -> float:
    """Return scored tokens a second."""
    return row["scored"] / row["seconds"]


def with_weights_s(row: Row) -> float:
    """Return the bound that also steps every weight and adds up every gradient, once a step."""
    return row["bound_s"] + row["weights_s"]


def train_table(rows: Sequence[Row], name: str) -> Table:
    """Return one line a way and setting."""
    first = rows[0]
    table = table_of(
        f"{name}: {first['steps']} steps of {first['global_batch']} samples, {first['tokens']} tokens, "
        f"{first['scored']} scored, the longest {first['longest']}; cap {first['cap_bytes'] / 1e9:g} GB a rank",
        "way", "setting", "seconds\n(least to most)", "scored\ntokens/s", "of its\nbound", "of that and\nweights",
        "peak MB\nof ranks", "mean\nloss",
    )  # fmt: skip
    for mine in grouped(rows, "way", "setting").values():
        peaks = [max(row["peak_bytes"][rank] for row in mine) for rank in range(len(first["peak_bytes"]))]
        table.add_row(
            mine[0]["way"],
            ", ".join(f"{key} {value}" for key, value in mine[0]["setting"].items()),
            spread([row["seconds"] for row in mine]),
            f"{median(map(rate, mine)):.0f}",
            f"{median(row['bound_s'] / row['seconds'] for row in mine):.2f}",
            f"{median(with_weights_s(row) / row['seconds'] for row in mine):.2f}",
            ", ".join(f"{peak / 1e6:.0f}" for peak in peaks),
            f"{mine[0]['loss']:.4f}",
        )
    parts = [row for row in rows if row["parts"]]
    for part in parts[0]["parts"] if parts else ():
        table.add_row("", f"ours, {part}", spread([row["parts"][part] for row in parts]), *[""] * 5)
    return table


def features_table(rows: Sequence[Row], name: str) -> Table:
    """Return one line a way, and one a part of the job's step."""
    first = rows[0]
    table = table_of(
        f"{name}: steps of {first['global_batch']} rows of {first['row_tokens']} tokens, nothing to split or to pad",
        "way", "ms a step\n(least to most of rounds)", "over the\nbest loop",
    )  # fmt: skip
    best = best_loop(rows)
    for (way,), mine in grouped(rows, "way").items():
        table.add_row(way, spread([1e3 * row["seconds"] for row in mine]), f"{median(ratios(rows, way, best)):.4f}")
    whole = [row for row in rows if row["way"] == FULL]
    for part in whole[0]["parts"]:
        table.add_row(f"  {part}", spread([1e3 * row["parts"][part] for row in whole]), "")
    rest = [1e3 * (row["seconds"] - sum(row["parts"].values())) for row in whole]
    table.add_row("  the rest: records, agreeing to go on", spread(rest), "")
    return table


def best_loop(rows: Sequence[Row]) -> str:
    """Return the fastest of the loops written by hand."""
    loops = {way: median(row["seconds"] for row in mine) for (way,), mine in grouped(rows, "way").items()}
    return min((way for way in loops if way.startswith(BARE)), key=lambda way: loops[way])


def ratios(rows: Sequence[Row], way: str, other: str) -> list[float]:
    """Return how much longer one way's step takes than the other's, round by round."""
    ours, theirs = ({row["round"]: row["seconds"] for row in rows if row["way"] == name} for name in (way, other))
    return [ours[number] / theirs[number] for number in ours if number in theirs]


def startup_table(rows: Sequence[Row], name: str) -> Table:
    """Return one line a case, cached and not, and one a moment."""
    table = table_of(
        f"{name}: seconds", "case", "runs", "to the first step", "held-out loss\nbefore it", "bare script", "beyond it"
    )
    for (case, cached), mine in grouped(rows, "case", "cached").items():
        label = f"{case}, {'data cached' if cached == 'True' else 'nothing cached'}"
        columns = ("first_step_s", "evaluating_s", "bare_s", "seconds")
        table.add_row(label, str(len(mine)), *(spread([row[column] for row in mine]) for column in columns))
        for key in [key for key in mine[0] if key.startswith("moment.")]:
            table.add_row(f"  {key.removeprefix('moment.')}", "", spread([row[key] for row in mine]), "", "", "")
    return table


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Return one claim a target of the parts that have rows."""
    makers = {"train": train_claims, "features": features_claims, "startup": startup_claims}
    claims: list[Claim] = []
    for part, quick, mine in parts_of(rows):
        if part in makers:
            claims += makers[part](mine, f"{part}, quick" if quick else part)
    return claims


def train_claims(rows: Sequence[Row], name: str) -> list[Claim]:
    """Return the claims of the whole job beside the peer; a round counts once both are there."""
    ways = {way: {row["round"]: row for row in rows if row["way"] == way} for way in ("ours", "peer")}
    pairs = [(ours, ways["peer"][number]) for number, ours in ways["ours"].items() if number in ways["peer"]]
    if not pairs:
        return []
    gains = [rate(ours) / rate(peer) for ours, peer in pairs]
    bound = median(peer["bound_s"] / ours["bound_s"] * ours["scored"] / peer["scored"] for ours, peer in pairs)
    balance = median(ours["bound_s"] / ours["balanced_s"] for ours, _ in pairs)
    rounds = f"{len(pairs)} rounds"
    told = f"{rounds}, {min(gains):.2f} to {max(gains):.2f}; bound {bound:.2f}"
    shares = [ours["bound_s"] / ours["seconds"] for ours, _ in pairs]
    weights = [with_weights_s(ours) / ours["seconds"] for ours, _ in pairs]
    note = f"{rounds}, {min(shares):.2f} to {max(shares):.2f}; slowest rank {balance:.2f}x the mean"
    claims = [
        at_least(f"{name}: scored tokens/s over Trainer's", median(gains), GAIN, "x", bound, told),
        at_least(f"{name}: time of products and attention over measured time", median(shares), OF_BOUND, "of it", 1.0,
                 note),
        at_least(f"{name}: the same and AdamW, the sum of gradients", median(weights), OF_BOUND, "of it", 1.0, rounds),
    ]  # fmt: skip
    peaks = {way: max(max(row["peak_bytes"]) for row in mine.values()) for way, mine in ways.items()}
    cap, peak = rows[0]["cap_bytes"], max(peaks.values())
    unlike = [row for row in rows if row["scored"] != row["expected"]]
    return [
        *claims,
        Claim(name=f"{name}: peak of the hungriest rank", value=peak / 1e6, unit="MB", target=f"<= {cap / 1e6:g}",
              bound=None, met=peak <= cap,
              note=", ".join(f"{way} {value / 1e6:.0f} MB" for way, value in peaks.items())),
        Claim(name=f"{name}: runs that scored other tokens", value=float(len(unlike)), unit="runs", target="== 0",
              bound=0.0, met=not unlike, note=f"{rows[0]['expected']} in each"),
    ]  # fmt: skip


def at_least(name: str, value: float, target: float, unit: str, bound: float, note: str) -> Claim:
    """Return a claim that is met from `target` up."""
    return Claim(name=name, value=value, unit=unit, target=f">= {target}", bound=bound, met=value >= target, note=note)


def features_claims(rows: Sequence[Row], name: str) -> list[Claim]:
    """Return the claims of features that cannot help."""
    best = best_loop(rows)
    over = ratios(rows, FULL, best)
    alone = median(ratios(rows, "chunks alone", best))
    apart = max_apart(rows)
    note = f"over {best}; {len(over)} rounds, {min(over):.3f} to {max(over):.3f}; chunks alone {alone:.3f}"
    return [
        Claim(name=f"{name}: a step with everything on over the best plain loop's", value=median(over), unit="x",
              target=f"<= {OVERHEAD}", bound=1.0, met=median(over) <= OVERHEAD, note=note),
        Claim(name=f"{name}: largest relative difference of a step's losses", value=apart, unit="",
              target=f"<= {SAME_LOSS:g}", bound=0.0, met=apart <= SAME_LOSS, note="the work is the same"),
    ]  # fmt: skip


def max_apart(rows: Sequence[Row]) -> float:
    """Return by how much the ways' losses of a step differ at most, relative."""
    steps = zip(*(row["losses"] for row in rows), strict=True)
    return max((max(step) - min(step)) / max(abs(loss) for loss in step) for step in steps)


def startup_claims(rows: Sequence[Row], name: str) -> list[Claim]:
    """Return one claim a case, cached and not."""
    claims = []
    for (case, cached), mine in grouped(rows, "case", "cached").items():
        seconds = [row["seconds"] for row in mine]
        label = "data cached" if cached == "True" else "nothing cached"
        claims.append(
            Claim(name=f"{name}: {case}, {label}, start to first step beyond a bare script", value=median(seconds),
                  unit="s", target=f"<= {BEYOND_S:g}", bound=0.0, met=median(seconds) <= BEYOND_S,
                  note=f"{len(seconds)} runs, {min(seconds):.1f} to {max(seconds):.1f}")
        )  # fmt: skip
    return claims
