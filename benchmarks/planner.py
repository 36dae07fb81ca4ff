"""How fast and how well steps are planned, beside TRL's packer at the same window.

    python -m benchmarks.planner [--quick] [--only scale|trl] [--json FILE]

`scale`: chunks over the L2 bound and time of one step of 256 and of 16384 sequences, on every distribution, and an
epoch of 10 million sequences in global batches of 4096. `trl`: samples/s and fill of both packers, interleaved, each
global batch packed by itself; TRL is given tokenized columns, as its trainer does, and what it cuts away is counted.
All on one core, without the tokens: lengths are what a plan is made from.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims import Claim, print_claims, write_report
from chunkflow.config import PlannerConfig
from chunkflow.layout import make_layout
from chunkflow.lengths import DISTRIBUTIONS
from chunkflow.pack import lower_bound_chunks
from chunkflow.plan import plan_step
from chunkflow.survey import survey

CHUNK_TOKENS = 8192
WINDOW = 4096
LIMITS_S = {256: 1e-3, 16_384: 60e-3}


def step_rows(rounds: int) -> list[dict[str, Any]]:
    """Plan single steps of every distribution at several chunk sizes; times are the best of the rounds."""
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        for num in LIMITS_S:
            for chunk_tokens in (2048, 4096, 8192, 16_384):
                config, seconds, over = PlannerConfig(chunk_tokens=chunk_tokens), [], []
                for seed in range(rounds):
                    lengths, samples = draw(num, seed=seed), np.arange(num)
                    started = time.perf_counter()
                    plan_step(0, samples, lengths, config=config, world_size=8, denominator=1.0)
                    seconds.append(time.perf_counter() - started)
                    layout = make_layout(samples, lengths, config=config, world_size=8)
                    over.append(layout.num_chunks - lower_bound_chunks(lengths, chunk_tokens=chunk_tokens))
                row = {"part": "step", "lengths": name, "samples": num, "chunk_tokens": chunk_tokens}
                share = float(np.mean(np.array(over) <= 1))
                rows.append({**row, "seconds": min(seconds), "max_over_bound": max(over), "share_within_1": share})
    return rows


def epoch_row(num: int) -> dict[str, Any]:
    """Plan an epoch of so many sequences."""
    config = PlannerConfig(chunk_tokens=CHUNK_TOKENS)
    found = survey(DISTRIBUTIONS["lmsys"](num, seed=0), config=config, batch=WINDOW, world_size=8, seed=0)
    return {"part": "epoch", "lengths": "lmsys", "samples": num, **found.to_json()}


def trl_rows(num: int, rounds: int) -> list[dict[str, Any]]:
    """Pack the same windows by both, turn by turn."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    rows, config = [], PlannerConfig(chunk_tokens=CHUNK_TOKENS)
    make_layout(np.arange(1), np.ones(1, dtype=np.int64), config=config, world_size=1)  # the kernels are loaded
    for name in ("lmsys", "llama3_sft"):
        lengths = DISTRIBUTIONS[name](num, seed=0)
        windows = [lengths[at : at + WINDOW] for at in range(0, num, WINDOW)]
        tables = [Dataset.from_dict({"input_ids": [[0] * int(n) for n in window]}) for window in windows]
        for number in range(rounds):
            started = time.perf_counter()
            layouts = [make_layout(np.arange(len(w)), w, config=config, world_size=1) for w in windows]
            ours_s = time.perf_counter() - started
            started = time.perf_counter()
            options: dict[str, Any] = {"strategy": "bfd", "map_kwargs": {"batch_size": WINDOW}}
            packed = [pack_dataset(table, CHUNK_TOKENS, **options) for table in tables]
            trl_s = time.perf_counter() - started
            chunks = sum(layout.num_chunks for layout in layouts)
            short = [np.minimum(w, CHUNK_TOKENS) for w in windows]
            cut = [make_layout(np.arange(len(w)), w, config=config, world_size=1) for w in short]
            cut_chunks = sum(layout.num_chunks for layout in cut)
            kept = sum(sum(map(len, table["input_ids"])) for table in packed)
            row = {"part": "trl", "lengths": name, "samples": num, "round": number}
            rows.append(
                {
                    **row,
                    "ours_samples_s": num / ours_s,
                    "trl_samples_s": num / trl_s,
                    "ours_fill": float(lengths.sum() / (chunks * CHUNK_TOKENS)),
                    "ours_fill_truncated": int(sum(w.sum() for w in short)) / (cut_chunks * CHUNK_TOKENS),
                    "trl_fill": kept / (sum(map(len, packed)) * CHUNK_TOKENS),
                    "trl_tokens_lost": int(lengths.sum()) - kept,
                    "trl_share_lost": 1 - kept / int(lengths.sum()),
                }
            )
    return rows


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """Return one claim a target."""
    claims = []

    def add(name: str, value: float, unit: str, limit: float, *, most: bool, note: str) -> None:
        target, met = (f"<= {limit:g}", value <= limit) if most else (f">= {limit:g}", value >= limit)
        claims.append(Claim(name=name, value=value, unit=unit, target=target, bound=None, met=met, note=note))

    steps = [row for row in rows if row["part"] == "step"]
    for num, limit in LIMITS_S.items():
        mine = [row for row in steps if row["samples"] == num]
        if mine:
            worst = max(mine, key=lambda row: row["seconds"])
            note = f"slowest: {worst['lengths']}, chunk_tokens {worst['chunk_tokens']}"
            add(f"plan of {num} samples", 1e3 * worst["seconds"], "ms", 1e3 * limit, most=True, note=note)
    mine = [row for row in steps if row["samples"] == 256]
    if mine:
        worst = max(mine, key=lambda row: row["max_over_bound"])
        note = f"{worst['lengths']}, chunk_tokens {worst['chunk_tokens']}"
        add("chunks over the L2 bound, 256 samples", worst["max_over_bound"], "chunks", 2, most=True, note=note)
        worst = min(mine, key=lambda row: row["share_within_1"])
        note = f"{worst['lengths']}, chunk_tokens {worst['chunk_tokens']}"
        add("batches within one chunk of it", worst["share_within_1"], "of all", 0.9, most=False, note=note)
    for row in (row for row in rows if row["part"] == "epoch"):
        limit = 90 * row["samples"] / 10**7
        note = f"{row['samples']} lengths in global batches of {WINDOW}"
        add("plan of an epoch", row["plan_seconds"], "s", limit, most=True, note=note)
    for name in sorted({row["lengths"] for row in rows if row["part"] == "trl"}):
        mine = [row for row in rows if row["part"] == "trl" and row["lengths"] == name]
        ratio = float(np.median([row["ours_samples_s"] / row["trl_samples_s"] for row in mine]))
        fills = f"fill {mine[0]['ours_fill']:.2%} against {mine[0]['trl_fill']:.2%}"
        lost = f"TRL loses {mine[0]['trl_tokens_lost']} tokens, {mine[0]['trl_share_lost']:.2%}"
        note = f"{fills}; {lost}, ours none"
        add(f"samples/s over TRL's bfd, {name}", ratio, "x", 10, most=False, note=note)
        gap = mine[0]["ours_fill_truncated"] - mine[0]["trl_fill"]
        note = f"both on sequences truncated to a chunk; with every token, ours fills {mine[0]['ours_fill']:.2%}"
        add(f"fill beside TRL's, {name}", 100 * gap, "points", 0, most=False, note=note)
    return claims


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 200,000 lengths instead of 10 million")
    parser.add_argument("--only", choices=["scale", "trl"], help="run one part")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/planner.json"), metavar="FILE")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.only != "trl":
        rows += step_rows(5 if arguments.quick else 40)
        rows.append(epoch_row(200_000 if arguments.quick else 10**7))
    if arguments.only != "scale":
        rows += trl_rows(2 * WINDOW if arguments.quick else 25 * WINDOW, 1 if arguments.quick else 5)
    claims = claims_of(rows)
    print_claims(claims)
    write_report(arguments.json, rows=rows, claims=claims)
    print(f"rows and claims: {arguments.json}")
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
