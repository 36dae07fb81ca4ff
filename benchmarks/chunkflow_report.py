"""Tables, plot and claims of `benchmarks.chunkflow`, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chunk_memory import slope_claims
from benchmarks.chunkflow_work import CAP_BYTES, data_set
from benchmarks.claims import Claim

Row = dict[str, Any]

PEERS = {
    "padded": ("transformers' padded batches, group_by_length, recompute", 2.5),
    "single": ("one sequence a micro-batch, round-robin, recompute", 1.5),
    "packed": ("TRL's packing (bfd), at its best setting", 1.0),
}
"""What claims call a peer, and by how much ours has to be faster."""
OF_BOUND = 0.9


def by_way(rows: Sequence[Row], part: str, *, quick: bool) -> dict[str, list[Row]]:
    """Return the rows of each way, round by round."""
    mine = [r for r in rows if r["part"] == part and r["quick"] == quick]
    return {way: [r for r in mine if r["way"] == way] for way in dict.fromkeys(r["way"] for r in mine)}


def rate(row: Row) -> float:
    """Return trained tokens a second."""
    return row["tokens"] / row["seconds"]


def bound_rate(row: Row) -> float:
    """Return the tokens a second that the hardware allows for the same operations on the same ranks."""
    return row["tokens"] / row["bound_s"]


def print_table(rows: Sequence[Row], part: str, *, quick: bool) -> None:
    """Print one line a way: medians over the rounds."""
    data = data_set(part, quick=quick)
    ways = by_way(rows, part, quick=quick)
    title = (
        f"{part}: {data.source}, divided by {data.factor:g}: {len(data.lengths)} sequences, {data.lengths.sum()} "
        f"tokens, the longest {data.lengths.max()}; two ranks, medians of {max(map(len, ways.values()))} rounds"
    )
    table = Table(title=title)
    for column in ("way", "setting", "tokens\ntrained", "seconds\n(least to most)", "tokens/s", "of its\nbound",
                   "of its\ncode's", "ours is\nfaster by", "bound\nof that", "peak\nMB", "loss"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("way", "setting") else "right")
    for way, mine in ways.items():
        seconds = [r["seconds"] for r in mine]
        gain, bound = gains(ways, way)
        table.add_row(
            way,
            ", ".join(f"{k} {v}" for k, v in mine[0]["setting"].items()),
            str(mine[0]["tokens"]),
            f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
            f"{median(map(rate, mine)):.0f}",
            f"{median(r['bound_s'] / r['seconds'] for r in mine):.2f}",
            f"{median(r['code_s'] / r['seconds'] for r in mine):.2f}",
            f"{gain:.2f}",
            f"{bound:.2f}",
            f"{max(r['peak_bytes'] for r in mine) / 1e6:.0f}",
            f"{mine[0]['loss']:.5f}",
        )
    Console(width=150).print(table)


def gains(ways: dict[str, list[Row]], way: str) -> tuple[float, float]:
    """Return how many times faster ours trains tokens, round by round, and what the hardware model gives for it."""
    pairs = list(zip(ways["ours"], ways[way], strict=False))
    return median(rate(o) / rate(p) for o, p in pairs), median(bound_rate(o) / bound_rate(p) for o, p in pairs)


def print_scan(rows: Sequence[Row], part: str, *, quick: bool) -> None:
    """Print every setting that was tried."""
    table = Table(title=f"{part}: settings, one run each; cap {CAP_BYTES / 1e6:.0f} MB")
    for column in ("way", "setting", "seconds", "tokens/s", "bound s", "peak MB"):
        table.add_column(column)
    for row in (r for r in rows if r["part"] == part and r["quick"] == quick):
        setting = ", ".join(f"{k} {v}" for k, v in row["setting"].items())
        numbers = f"{row['seconds']:.1f}", f"{rate(row):.0f}", f"{row['bound_s']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}"
        table.add_row(row["way"], setting, *numbers)
    Console().print(table)


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Return one claim a target of the parts that have rows."""
    claims = []
    for part in ("lmsys", "stdlib"):
        for quick in (False, True):
            if ways := by_way(rows, part, quick=quick):
                claims += step_claims(ways, f"{part}, quick" if quick else part)
    if memory := [r for r in rows if r["part"] == "memory"]:
        claims += slope_claims(memory)
    return claims


def step_claims(ways: dict[str, list[Row]], name: str) -> list[Claim]:
    """Return the claims of one data set."""
    mine = ways["ours"]
    share = median(r["bound_s"] / r["seconds"] for r in mine)
    balance = median(r["bound_s"] / r["balanced_s"] for r in mine)
    note = f"{len(mine)} rounds; slowest rank of the bound {balance:.2f}x their mean"
    claims = [at_least(f"{name}: time that the hardware needs over measured time", share, OF_BOUND, "of it", 1.0, note)]
    code = median(r["code_s"] / r["seconds"] for r in mine)
    name_ = f"{name}: time that transformers' layers, attention and projection need over measured time"
    claims.append(at_least(name_, code, OF_BOUND, "of it", 1.0, f"{len(mine)} rounds"))
    for way, (title, target) in PEERS.items():
        gain, bound = gains(ways, way)
        lost = mine[0]["tokens"] - ways[way][0]["tokens"]
        note = f"{len(ways[way])} rounds" + (
            f"; it loses {lost} of {mine[0]['tokens']} tokens, {lost / mine[0]['tokens']:.1%}" if lost else ""
        )
        claims.append(at_least(f"{name}: tokens/s over {title}", gain, target, "x", bound, note))
    peak = max(r["peak_bytes"] for rows in ways.values() for r in rows)
    claims.append(
        Claim(name=f"{name}: peak of the hungriest way", value=peak / 1e6, unit="MB", target=f"<= {CAP_BYTES / 1e6:g}",
              bound=None, met=peak <= CAP_BYTES, note=f"ours {max(r['peak_bytes'] for r in mine) / 1e6:.0f} MB")
    )  # fmt: skip
    losses = [rows[0]["loss"] for way, rows in ways.items() if way != "packed"]
    apart = max(losses) - min(losses)
    claims.append(
        Claim(name=f"{name}: difference of the losses, those that train every token", value=apart, unit="nats",
              target="<= 1e-4", bound=0.0, met=apart <= 1e-4, note="the work is the same")
    )  # fmt: skip
    return claims


def at_least(name: str, value: float, target: float, unit: str, bound: float, note: str) -> Claim:
    """Return a claim that is met from `target` up, and says its bound."""
    said = f"{note}; bound {bound:.2f}"
    return Claim(name=name, value=value, unit=unit, target=f">= {target}", bound=bound, met=value >= target, note=said)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens/s of every way beside its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [(part, quick, by_way(rows, part, quick=quick)) for part in ("lmsys", "stdlib") for quick in (False, True)]
    parts = [entry for entry in parts if entry[2]]
    figure, every = plt.subplots(1, max(1, len(parts)), figsize=(5 * max(1, len(parts)), 4), squeeze=False)
    for axes, (part, quick, ways) in zip(every[0], parts, strict=False):
        for place, mine in enumerate(ways.values()):
            axes.bar(place, median(map(rate, mine)), color="tab:blue" if place == 0 else "tab:gray")
            axes.plot([place - 0.4, place + 0.4], [median(map(bound_rate, mine))] * 2, color="black", linestyle=":")
        axes.set_xticks(range(len(ways)), list(ways))
        axes.set_ylabel("tokens/s, two ranks")
        axes.set_title(f"{part}{', quick' if quick else ''}; dotted: what the hardware allows")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
