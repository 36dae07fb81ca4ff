"""The first part of `benchmarks.job`: the whole job in turn with transformers' Trainer, and the bound of both."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chunkflow_bound import Rates
from benchmarks.chunkflow_work import Load
from benchmarks.job_data import Tokens, flags, mix, model_folder
from benchmarks.job_runs import WORLD_SIZE, torchrun
from benchmarks.ranks import run_ranks

Row = dict[str, Any]
SAVE_EVERY = 10
LR, WARMUP_STEPS = 1e-4, 3
DEADLINE_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is trained."""

    steps: int
    global_batch: int
    cap_bytes: int
    """Resident set of a rank, libraries included, that no way may exceed."""
    quick: bool


FULL = Size(steps=20, global_batch=32, cap_bytes=5_000_000_000, quick=False)
QUICK = Size(steps=10, global_batch=8, cap_bytes=1_000_000_000, quick=True)
SCAN = Size(steps=5, global_batch=32, cap_bytes=5_000_000_000, quick=False)

OURS: Mapping[str, int] = {"chunk_tokens": 1024, "retain": 4}
PEER: Mapping[str, int] = {"batch": 1}
QUICK_OURS: Mapping[str, int] = {"chunk_tokens": 256, "retain": 1}
SETTINGS: Sequence[tuple[str, Mapping[str, int]]] = [
    *[("ours", {"chunk_tokens": c, "retain": k}) for c, k in ((1024, 1), (1024, 4), (2048, 2), (4096, 1))],
    *[("peer", {"batch": b}) for b in (1, 2, 4)],
]
"""What `--scan` runs once each, by what takes more and more memory."""


def measure(*, numbers: Sequence[int], quick: bool) -> Iterator[Row]:
    """Run both ways in turn, in the rounds of these numbers, rates before each."""
    size = QUICK if quick else FULL
    ways = [("ours", QUICK_OURS if quick else OURS), ("peer", PEER)]
    model = model_folder(quick=quick)
    data = mix(model, count=size.steps * size.global_batch, quick=quick)
    for number in numbers:
        measured = rates_now(model)
        turned = ways[number % 2 :] + ways[: number % 2]
        for way, setting in turned:
            yield {"part": "train", "round": number, **run_way(way, setting, model, data, size, measured)}


def scan(*, numbers: Sequence[int], quick: bool) -> Iterator[Row]:
    """Run every setting once, on less data; of each side none behind one that exceeds the cap."""
    size = QUICK if quick else SCAN
    model = model_folder(quick=quick)
    data = mix(model, count=size.steps * size.global_batch, quick=quick)
    measured = rates_now(model)
    over: set[str] = set()
    for way, setting in SETTINGS:
        if way not in over:
            row = run_way(way, setting, model, data, size, measured)
            over |= {way} if max(row["peak_bytes"]) > size.cap_bytes else set()
            yield {"part": "scan", "round": numbers[0], **row}


def rates_now(model: Path) -> Row:
    """Return what kernels, a step's update and its reduction take now, while both ranks compute."""
    options = {"model": str(model)}
    return run_ranks("benchmarks.job_rates", options, ranks=WORLD_SIZE, deadline_s=DEADLINE_S)[0]


def run_way(way: str, setting: Mapping[str, int], model: Path, data: Tokens, size: Size, measured: Row) -> Row:
    """Run one job from nothing; return its row."""
    with tempfile.TemporaryDirectory(prefix="bench-job-run-") as folder:
        ranks = (_ours if way == "ours" else _peer)(setting, model, data, size, Path(folder) / "run")
    scored = [ours_scored(ranks) if way == "ours" else sum(rank["scored"] for rank in ranks)]
    seconds = max(r["ended"] for r in ranks) - min(r["assembled"] for r in ranks)
    bound_s, balanced_s = bound_seconds(Rates(**measured["rates"]), [_loads(rank) for rank in ranks])
    weights_s = len(ranks[0]["steps"]) * (measured["update_s"] + measured["reduce_s"])
    return {
        "way": way, "setting": dict(setting), "quick": size.quick, "seconds": seconds, "scored": int(scored[0]),
        "expected": data.scored, "tokens": sum(data.lengths), "longest": max(data.lengths),
        "steps": len(ranks[0]["steps"]), "global_batch": size.global_batch, "bound_s": bound_s,
        "balanced_s": balanced_s, "weights_s": weights_s, "cap_bytes": size.cap_bytes,
        "peak_bytes": [peak_of(ranks, number) for number in range(len(ranks))], "loss": loss_of(ranks),
        "parts": parts_of(ranks[0].get("metrics", [])), **measured,
    }  # fmt: skip


def _ours(setting: Mapping[str, int], model: Path, data: Tokens, size: Size, run: Path) -> list[Row]:
    settings = {
        **{f"chunks.{key}": value for key, value in setting.items()}, "chunks.global_batch": size.global_batch,
        "chunks.pair_cost": 0.0003, "checkpoint.every": SAVE_EVERY, "run.eval_every": SAVE_EVERY,
        "optimizer.lr": LR, "optimizer.weight_decay": 0.0, "schedule.warmup_steps": WARMUP_STEPS,
        **common(model, data.path, run),
    }  # fmt: skip
    return torchrun("benchmarks.job_ours", flags(settings), deadline_s=DEADLINE_S)


def common(model: Path, data: Path, run: Path) -> dict[str, object]:
    """Return the settings that every job of ours has here."""
    return {
        "run.folder": run, "model.path": str(model), "data.kind": "jsonl", "data.path": data,
        "data.cache": data.parent / "tokens", "data.held_out": 0, "data.long_files": [],
    }  # fmt: skip


def _peer(setting: Mapping[str, int], model: Path, data: Tokens, size: Size, run: Path) -> list[Row]:
    options = {
        **setting, "model": str(model), "data": str(data.path), "run": str(run), "lr": LR, "precision": "fp32",
        "global_batch": size.global_batch, "world_size": WORLD_SIZE, "warmup_steps": WARMUP_STEPS,
        "save_every": SAVE_EVERY,
    }  # fmt: skip
    ranks = torchrun("benchmarks.job_peer", [json.dumps(options)], deadline_s=DEADLINE_S)
    seen = sorted(number for rank in ranks for number in rank["samples"])
    if seen != list(range(len(data.samples))):
        raise RuntimeError(f"the peer trained {len(seen)} samples, {len(set(seen))} different of {len(data.samples)}")
    return ranks


def ours_scored(ranks: Sequence[Row]) -> float:
    """Return the targets that our run's metrics file counts."""
    return math.fsum(line.get("supervised_tokens", 0.0) for line in ranks[0]["metrics"])


def _loads(rank: Row) -> list[Load]:
    return [Load(**load) for load in rank["loads"]]


def bound_seconds(rates: Rates, loads: Sequence[Sequence[Load]]) -> tuple[float, float]:
    """Return the least seconds of all steps, of their slowest ranks and of the mean rank; loads are [ranks][steps]."""
    steps = [[rates.seconds(load) for load in step] for step in zip(*loads, strict=True)]
    return math.fsum(map(max, steps)), math.fsum(sum(step) / len(step) for step in steps)


def peak_of(ranks: Sequence[Row], number: int) -> int:
    """Return the largest resident set of a rank while it trained, checkpoints included."""
    by_step = [line["ranks"]["peak_bytes"][number] for line in ranks[0].get("metrics", []) if "ranks" in line]
    return int(max([ranks[number]["peak_bytes"], *by_step]))


def loss_of(ranks: Sequence[Row]) -> float:
    """Return the mean of the steps' losses; the peer's ranks each know their own part, times the ranks."""
    if "loss" in ranks[0]:
        return math.fsum(rank["loss"] for rank in ranks) / len(ranks)
    return math.fsum(ranks[0]["losses"]) / len(ranks[0]["losses"])


def parts_of(metrics: Sequence[Row]) -> dict[str, float]:
    """Return where our steps' time went, summed over the steps, from the run's metrics file."""
    names = sorted({key for line in metrics for key in line if key.startswith("seconds.")})
    return {name.removeprefix("seconds."): math.fsum(line.get(name, 0.0) for line in metrics) for name in names}
