"""The parts `real` and `capped` of `benchmarks.pipeline`: two ranks of one thread, real layers.

`real`: RoundPipe, synchronous, against torch.distributed.pipelining's Schedule1F1B and ScheduleInterleaved1F1B at the
contiguous split that is best by the measured costs of the layers. All recompute activations, under one cap of device
memory, which RoundPipe's arena enforces: 95% of what 1F1B needs without recomputation. A step is forward, backward and
AdamW; the ways take turns. The same work is verified: losses of every step, and every gradient of the first.
`capped`: a model whose weights and gradients are eight times as large as a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim
from benchmarks.moe_claims import at_least, at_most
from benchmarks.pipeline_model import Shape, shapes
from benchmarks.pipeline_options import Options
from benchmarks.ranks import run_ranks

Row = dict[str, Any]

MODULE = "benchmarks.pipeline_real_rank"
DEADLINE_S = 1800
BALANCED = 1.10
"""Work of the busier rank over the mean, from which on no other split can be balanced."""


def run_real(options: Options) -> Iterator[Row]:
    """Measure the rows that are asked for; yield them as they come."""
    for shape in shapes(quick=options.quick):
        if not options.models or shape.name in options.models:
            if options.quick and not options.models and shape.name != "head 8":
                continue
            yield from _run("real", shape, options, options.rounds or (2 if options.quick else 7))


def run_capped(options: Options) -> Iterator[Row]:
    """Train the deep model."""
    layers, tokens = (32, 32) if options.quick else (48, 128)
    shape = Shape(name=f"{layers} layers, head 2", layers=layers, head=2, tokens=tokens, microbatches=4)
    yield from _run("capped", shape, options, options.rounds or 3)


def _run(part: str, shape: Shape, options: Options, rounds: int) -> list[Row]:
    chosen = {"part": part, "shape": asdict(shape), "rounds": rounds, "quick": options.quick}
    return run_ranks(MODULE, chosen, ranks=2, deadline_s=DEADLINE_S)


def best_of(row: Row, key: str) -> tuple[str, float]:
    """Return the better peer, by the median of measured seconds or by simulated ones."""
    found = {
        name: median(way["seconds"]) if key == "seconds" else way["simulated_s"]
        for name, way in row["ways"].items()
        if name != "ours"
    }
    name = min(found, key=lambda name: found[name])
    return name, found[name]


def speedups(row: Row) -> list[float]:
    """Return how many times faster ours is than the better peer, round by round."""
    name, _ = best_of(row, "seconds")
    ways = row["ways"]
    return [theirs / ours for theirs, ours in zip(ways[name]["seconds"], ways["ours"]["seconds"], strict=True)]


def imbalance(row: Row) -> float:
    """Return the busier rank's work over the mean, at the split of the better peer."""
    loads = row["loads"][best_of(row, "simulated_s")[0]]
    return max(loads) * len(loads) / sum(loads)


def show_real(rows: Sequence[Row]) -> None:
    """Print one line a model."""
    table = Table(title="real: two ranks, seconds a step, medians (least to most) of interleaved rounds")
    for column in ("model", "head costs\nlayers", "1F1B", "interleaved", "RoundPipe", "faster by\n(least to most)",
                   "simulated", "with\ncopies", "zero\nbubble", "busier rank\nof the peer", "rounds, open\nslots",
                   "cap MB\n(ours, 1F1B)"):  # fmt: skip
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        ways, plan, gains = row["ways"], row["plan"], speedups(row)
        peer_s, ours_s = best_of(row, "simulated_s")[1], ways["ours"]["simulated_s"]
        peaks = row["peak_bytes"]
        table.add_row(
            row["model"],
            f"{row['head_layers']:.1f}",
            *(_spread(ways[name]["seconds"]) for name in ("1f1b", "interleaved", "ours")),
            f"{median(gains):.3f}\n({min(gains):.2f} to {max(gains):.2f})",
            f"{peer_s / ours_s:.3f}",
            f"{peer_s / (ours_s + row['copies_s']):.3f}",
            f"{peer_s / row['zero_bubble_s']:.3f}",
            f"{imbalance(row):.2f} of mean",
            f"{len(plan['rounds'])}, {plan['open_slots']}, {_slots(plan['partition'])}",
            f"{row['cap_bytes'] / 1e6:.0f}\n({peaks['ours'] / 1e6:.0f}, {peaks['1f1b'] / 1e6:.0f})",
        )
    Console(width=190).print(table)


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f}\n({min(seconds):.2f} to {max(seconds):.2f})"


def _slots(partition: dict[str, Any]) -> int:
    return len(partition["forward"]) + 1 + len(partition["backward"])


def show_capped(rows: Sequence[Row]) -> None:
    """Print what was trained, and what a peer would need."""
    table = Table(title="capped: a model larger than its devices, two ranks")
    for column in ("model", "weights and\ngradients MB", "cap MB", "RoundPipe's\npeak MB", "1F1B needs\nat least MB",
                   "seconds a step", "losses", "apart from\n1F1B without a cap"):  # fmt: skip
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("model_bytes", "cap_bytes", "peak_bytes", "peer_bytes"))
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        table.add_row(row["model"], *sizes, _spread(row["seconds"]), losses, f"{losses_apart(row):.1e}")
    Console(width=170).print(table)


def losses_apart(row: Row) -> float:
    """Return the largest relative difference of the losses of a step between ways."""
    if row["part"] == "capped":
        runs = [row["losses"], row["peer_losses"]]
    else:
        # A way's steps follow each other, so the k-th of each has had the same steps before it.
        runs = [way["losses"] for way in row["ways"].values()]
    return max((max(step) - min(step)) / abs(min(step)) for step in zip(*runs, strict=True))


def claims_of_real(rows: Sequence[Row]) -> list[Claim]:
    """Return, for each model, the speed and whether the work was the same."""
    claims = []
    for row in rows:
        name, (peer, peer_s) = row["model"], best_of(row, "simulated_s")
        tied = imbalance(row) < BALANCED
        target = 0.97 if tied else 1.10
        what = "where its split balances" if tied else "where it cannot"
        gains, promised = speedups(row), peer_s / row["ways"]["ours"]["simulated_s"]
        with_copies = peer_s / (row["ways"]["ours"]["simulated_s"] + row["copies_s"])
        note = (
            f"{len(gains)} interleaved rounds, {min(gains):.2f} to {max(gains):.2f}; the bound is the simulator's, "
            f"{with_copies:.2f} with the copies that take the same cores; {peer}"
        )
        claims.append(at_least(f"{name}: over the better peer, {what}", median(gains), target, "x", promised, note))
        claims.append(at_most(f"{name}: losses apart", losses_apart(row), 1e-4, "relative", 0.0, "every step"))
        apart = max(row["gradients_apart"].values())
        claims.append(at_most(f"{name}: gradients apart", apart, 1e-3, "relative", 0.0, "of the largest entry"))
    return claims


def claims_of_capped(rows: Sequence[Row]) -> list[Claim]:
    """Return that the model is too large for a peer, and was trained."""
    claims = []
    for row in rows:
        name, cap = row["model"], row["cap_bytes"]
        times = row["peer_bytes"] / cap
        note = "weights and gradients alone, best split: 1F1B cannot train it"
        claims.append(at_least(f"{name}: what a peer's rank needs over the cap", times, 2, "x", None, note))
        note = f"{row['peak_bytes'] / 1e6:.0f} of {cap / 1e6:.0f} MB, enforced by the arena"
        claims.append(at_most(f"{name}: RoundPipe's peak over the cap", row["peak_bytes"] / cap, 1.0, "x", None, note))
        claims.append(at_most(f"{name}: losses apart", losses_apart(row), 1e-4, "relative", 0.0, "1F1B without a cap"))
    return claims
