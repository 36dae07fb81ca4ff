"""What `benchmarks.moe` is there to show, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import Claim

Row = dict[str, Any]


def claims_of(rows: Sequence[Row], *, quick: bool) -> list[Claim]:
    """Return the claims of the parts that have rows."""
    claims = []
    if layers := [r for r in rows if r["part"] == "grid"]:
        claims += grid_claims(layers, quick=quick)
    if stacks := [r for r in rows if r["part"] == "models"]:
        claims += model_claims(stacks)
    if emulated := [r for r in rows if r["part"] != "real" and r["hidden_planned"] > 0.02]:
        hidden = [r["hidden"] / r["hidden_planned"] for r in emulated]
        note = f"{len(hidden)} rows that planned to hide gradients"
        claims += [
            at_least(
                "gradient communication hidden, median", quantile(hidden, 50), 0.9, "of what was planned", 1.0, note
            ),
            at_least("gradient communication hidden, p10", quantile(hidden, 10), 0.7, "of what was planned", 1.0, note),
        ]
    return claims + real_claims([r for r in rows if r["part"] == "real"])


def real_claims(rows: Sequence[Row]) -> list[Claim]:
    """Return the claims beside the real peers that do the same work: of both steps of a turn, the worse one."""
    claims: list[Claim] = []
    compared = [r for r in rows if r["speedup"] is not None and r["same_work"]]
    for work, way in dict.fromkeys((r["work"], r["way"]) for r in compared):
        row = min((r for r in compared if (r["work"], r["way"]) == (work, way)), key=lambda r: r["speedup"])
        note = f"real experts on two ranks, no shaping; {row['step']} step of a turn"
        claims.append(at_least(f"{work}, against {way}", row["speedup"], 0.97, "x", None, note))
    return claims


def grid_claims(rows: Sequence[Row], *, quick: bool) -> list[Claim]:
    """Return the claims over the grid of layers."""
    over = [r["ours_s"] / r["predicted_s"] for r in rows]
    note = f"{len(rows)} layers"
    claims = [
        at_most("measured layer time over T(r*), median", quantile(over, 50), 1.08, "x", 1.0, note),
        at_most("measured layer time over T(r*), p95", quantile(over, 95), 1.20, "x", 1.0, note),
    ]
    for peer, title in (("fixed", "the best single r"), ("none", "no overlap")):
        kept = [gain(r, peer) / predicted_gain(r, peer) for r in rows]
        best = max(gain(r, peer) for r in rows)
        said = f"{note}; gains up to {best:.2f}x"
        claims += [
            at_least(f"gain over {title}, measured over predicted, median", quantile(kept, 50), 0.97, "x", 1.0, said),
            at_least(f"gain over {title}, measured over predicted, p5", quantile(kept, 5), 0.88, "x", 1.0, said),
        ]
    better = [min(r["fixed_s"], r["none_s"]) / r["ours_s"] for r in rows]
    claims += [
        at_least("against the better peer, p5", quantile(better, 5), 0.97, "x", None, note),
        at_least("against the better peer, worst", min(better), 0.93, "x", None, note),
    ]
    if not quick:
        claims.append(
            at_least("layer configurations", len(rows), 48, "layers", None, "every layer at three link speeds")
        )
    return claims


def model_claims(rows: Sequence[Row]) -> list[Claim]:
    """Return the claims over the model-shaped stacks, the worst of each."""
    claims = [
        worst(rows, "models: gain over the best single r, measured over predicted", 0.93,
              lambda r: gain(r, "fixed") / predicted_gain(r, "fixed"), bound=1.0),
        worst(rows, "models: T(r*) over measured", 0.90, lambda r: r["predicted_s"] / r["ours_s"], bound=1.0),
    ]  # fmt: skip
    if promising := [r for r in rows if predicted_gain(r, "fixed") >= 1.18]:
        bound = min(predicted_gain(r, "fixed") for r in promising)
        name = "models: over the best single r, where T promises 1.18x"
        claims.append(worst(promising, name, 1.12, lambda r: gain(r, "fixed"), bound=bound))
    if heavy := [r for r in rows if r["share"] >= 0.5]:
        bound = min(predicted_gain(r, "none") for r in heavy)
        name = "models: over no overlap, from a share of 0.5 up"
        claims.append(worst(heavy, name, 1.4, lambda r: gain(r, "none"), bound=bound))
    return claims


def gain(row: Row, peer: str) -> float:
    """Return how many times faster than a peer the plan ran."""
    return row[f"{peer}_s"] / row["ours_s"]


def predicted_gain(row: Row, peer: str) -> float:
    """Return how many times faster it should have been."""
    return row[f"predicted_{peer}_s"] / row["predicted_s"]


def quantile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, linear between neighbours."""
    return float(np.percentile(values, percent))


def worst(rows: Sequence[Row], name: str, target: float, value: Callable[[Row], float], *, bound: float) -> Claim:
    """Return the claim that every row reaches the target."""
    row = min(rows, key=value)
    note = f"worst of {len(rows)} rows: {row['layer']} at a share of {row['share']:.2f}"
    return at_least(name, value(row), target, "x", bound, note)


def at_least(name: str, value: float, target: float, unit: str, bound: float | None, note: str) -> Claim:
    """Return a claim that is met from `target` up."""
    return Claim(
        name=name, value=value, unit=unit, target=f">= {target}", bound=bound, met=bool(value >= target), note=note
    )


def at_most(name: str, value: float, target: float, unit: str, bound: float | None, note: str) -> Claim:
    """Return a claim that is met up to `target`."""
    return Claim(
        name=name, value=value, unit=unit, target=f"<= {target}", bound=bound, met=bool(value <= target), note=note
    )
