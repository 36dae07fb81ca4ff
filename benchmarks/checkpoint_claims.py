"""What the rows of the checkpoint benchmark show, for every target that they say something about."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np

from benchmarks.checkpoint_tables import Rows, by, interval, mid, ratios, taken
from benchmarks.claims import Claim


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
    for (part, state), found in by(rows, "part", "state").items():
        if part == "blocked":  # what a save costs where no core is idle: the CPU time it takes on an idle machine
            own = [row for row in rows if (row["part"], row["state"], row["way"]) == ("durable", state, "ours")]
            found = [{**row, "cpu_s": mid(own, "cpu_s") / 2 if own else None} for row in found]
        CLAIMS[part](claims, found, state.split(" with")[0])
    return claims.all


def _claim_blocked(claims: _Claims, rows: Rows, state: str) -> None:
    ways = {way: own for (way,), own in by(rows, "way").items()}
    if "ours" not in ways:
        return
    ours = [taken(row) for row in ways["ours"]]
    low, high = interval(ours)
    mine, stop, cpu_s = median(ours), mid(ways["ours"], "stop_s"), rows[0]["cpu_s"]
    note = f"{len(ours)} pairs; ours {mine * 1e3:.0f} ms, 95% CI {low * 1e3:.0f} to {high * 1e3:.0f}"
    if "torch.save" in ways:
        theirs = mid(ways["torch.save"], taken)
        text = f"{note}; torch.save {theirs * 1e3:.0f} ms; upper end of the interval: {high / theirs:.3f}"
        bound = None if cpu_s is None else cpu_s / theirs
        if bound is not None:
            text = f"{text}; the bound is the CPU time of copy, hash and write, for cores that are never idle"
        claims.add(f"{state}: blocked, of torch.save's", mine / theirs, "", "<= 0.05", bound, text)
        call = mid(ways["torch.save"], "stop_s")
        text = f"save() + fence {stop * 1e3:.1f} ms, torch.save {call * 1e3:.0f} ms; steps beside it not counted"
        claims.add(f"{state}: stopped, of torch.save's", stop / call, "", "<= 0.0208", None, text)
    peers = {way: mid(own, taken) for way, own in ways.items() if way not in ("ours", "torch.save")}
    if peers:
        best = min(peers, key=lambda way: peers[way])
        text = f"{note}; {best} {peers[best] * 1e3:.0f} ms"
        claims.add(f"{state}: blocked, of the best peer's", mine / peers[best], "", "<= 0.25", None, text)


def _claim_durable(claims: _Claims, rows: Rows, state: str) -> None:
    ways = {way: own for (way,), own in by(rows, "way").items()}
    pair = ("sitting", "round")
    if "ours" in ways:
        found = ratios(rows, "raw", "ours", "durable_s", pair)
        low, high = interval(found)
        note = f"{len(found)} paired rounds, 95% CI {low:.2f} to {high:.2f}"
        claims.add(f"{state}: durable, of the raw limit", median(found), "x", ">= 0.9", 1.0, note)
        own = ways["ours"]
        share = mid(own, lambda row: row["commit_s"] / row["durable_s"])
        note = f"{mid(own, 'commit_s') * 1e3:.1f} ms of {mid(own, 'durable_s'):.2f} s"
        claims.add(f"{state}: manifest and commit, of the durable time", share, "", "<= 0.03", None, note)
        hashing = mid(own, lambda row: row["hash_cpu_s"] / (row["num_bytes"] / 2 / 1e9))
        note = "xxh3 of what was copied just before; the bound is one core at 32 GB/s"
        claims.add(f"{state}: hashing", hashing, "CPU s/GB", "<= 0.06", 1 / 32, note)
    found = ratios(rows, "DCP", "ours", "durable_s", pair)
    if found:
        bound = median(ratios(rows, "DCP", "raw", "durable_s", pair))
        note = f"{len(found)} paired rounds; the bound is the raw writer's"
        claims.add(f"{state}: durable, over DCP with fsync", median(found), "x", ">= 2", bound, note)


def _claim_train(claims: _Claims, rows: Rows, state: str) -> None:
    for (way, busy), own in by(rows, "way", "busy").items():
        if way != "ours":
            continue
        times = {kind: [row["step_s"] for row in found] for (kind,), found in by(own, "kind").items()}
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


CLAIMS: dict[str, Callable[[_Claims, Rows, str], None]] = {
    "blocked": _claim_blocked,
    "durable": _claim_durable,
    "train": _claim_train,
    "fence": lambda claims, rows, state: None,
    "small": _claim_small,
    "load": _claim_load,
}
