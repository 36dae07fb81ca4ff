"""Peak memory of training one long sequence in chunks, beside training it whole.

    python -m benchmarks.chunk_memory [--quick] [--only MODE] [--json FILE] [--plot FILE]

For a longest sequence of 1, 4, 16 and 64 times `chunk_tokens`: peak resident set above a warmed base, each in a fresh
process. What must remain, whatever the method, is one chunk's work and the sequence's keys, values and their fp32
gradients: that is the bound, and the target is to stay within 1.15 of it. Whole means transformers' own forward and
loss; recomputed, with activation checkpointing in every layer. Tokens/s are of one run each, and no claim.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chunk_memory_case import Case, key_value_bytes
from benchmarks.claims import Claim, print_claims, write_report

RATIOS = (1, 4, 16, 64)
SLOPE_RATIOS = (32, 64, 128, 256)
MODES = {"chunks": "chunks", "full": "whole", "full_checkpointed": "whole, recomputed"}
"""Modes of a `Case`, and what tables call them."""
TARGET = 1.15
DEADLINE_S = 1800


def run(case: Case) -> dict[str, Any]:
    """Measure one case in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.chunk_memory_case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bound_bytes(rows: Sequence[dict[str, Any]], case: Case) -> int:
    """Return one chunk's measured peak and the sequence's keys, values and gradients."""
    one = next(r for r in rows if r["mode"] == "chunks" and r["num_tokens"] == case.chunk_tokens)
    return one["peak_bytes"] + key_value_bytes(case, case.num_tokens)


def claims_of(rows: Sequence[dict[str, Any]], base: Case) -> list[Claim]:
    """Return one claim for each sequence longer than a chunk."""
    claims = []
    for row in rows:
        if row["mode"] != "chunks" or row["num_tokens"] == base.chunk_tokens:
            continue
        bound = bound_bytes(rows, replace(base, num_tokens=row["num_tokens"]))
        ratio = row["peak_bytes"] / bound
        times = row["num_tokens"] // base.chunk_tokens
        note = f"{row['peak_bytes'] / 1e6:.1f} MB against one chunk + K, V and gradients, {bound / 1e6:.1f} MB"
        claims.append(
            Claim(
                name=f"peak memory of a sequence of {times}x chunk_tokens",
                value=ratio,
                unit="of the bound",
                target=f"<= {TARGET}",
                bound=1.0,
                met=ratio <= TARGET,
                note=note,
            )
        )
    return claims


def measure_slope(*, quick: bool) -> list[dict[str, Any]]:
    """Measure sequences of 32 to 256 times `chunk_tokens`, in chunks; one layer, so that the longest takes minutes."""
    base = Case(mode="chunks", num_tokens=0, chunk_tokens=64 if quick else 256, hidden=256, layers=1)
    ratios = SLOPE_RATIOS[:2] if quick else SLOPE_RATIOS
    return [run(replace(base, num_tokens=ratio * base.chunk_tokens)) for ratio in ratios]


def slope_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Return how the peak grows with each token of the longest sequence, beside its keys, values and gradients."""
    fields = Case.__dataclass_fields__
    case = Case(**{name: rows[0][name] for name in fields})
    tokens, peaks = ([row[name] for row in rows] for name in ("num_tokens", "peak_bytes"))
    slope = float(np.polyfit(tokens, peaks, 1)[0])
    bound = key_value_bytes(case, 1)
    from_to = f"{tokens[0] // case.chunk_tokens}x to {tokens[-1] // case.chunk_tokens}x chunk_tokens"
    note = f"{bound} bytes of keys, values and gradients a token; peaks " + ", ".join(f"{p / 1e6:.1f}" for p in peaks)
    return [
        Claim(
            name=f"growth of the peak from {from_to}",
            value=slope / bound,
            unit="of the bound",
            target="0.9 to 1.1",
            bound=1.0,
            met=0.9 <= slope / bound <= 1.1,
            note=f"{note} MB",
        )
    ]


def print_table(rows: Sequence[dict[str, Any]], base: Case) -> None:
    """Print peak memory and speed, one line a sequence length."""
    table = Table(
        title=f"one sequence, chunk_tokens {base.chunk_tokens}, hidden {base.hidden}, {base.layers} layers, fp32"
    )
    table.add_column("tokens", justify="right")
    for title in (*MODES.values(), "bound"):
        table.add_column(f"{title}\nMB" if title == "bound" else f"{title}\nMB (tokens/s)", justify="right")
    for ratio in RATIOS:
        tokens = ratio * base.chunk_tokens
        cells = []
        for mode in MODES:
            found = [r for r in rows if r["mode"] == mode and r["num_tokens"] == tokens]
            cells += [f"{r['peak_bytes'] / 1e6:.1f} ({tokens / r['seconds']:.0f})" for r in found] or ["-"]
        has_bound = any(r["mode"] == "chunks" for r in rows)
        bound = f"{bound_bytes(rows, replace(base, num_tokens=tokens)) / 1e6:.1f}" if has_bound and ratio > 1 else "-"
        table.add_row(f"{tokens} ({ratio}x)", *cells, bound)
    Console().print(table)


def plot(rows: Sequence[dict[str, Any]], base: Case, path: Path) -> None:
    """Draw peak memory over sequence length, and its bound where chunks were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for mode, title in MODES.items():
        points = sorted((r["num_tokens"], r["peak_bytes"] / 1e6) for r in rows if r["mode"] == mode)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=title)
        if points and mode == "chunks":
            tokens = [n for n, _ in points]
            bounds = [bound_bytes(rows, replace(base, num_tokens=n)) / 1e6 for n in tokens]
            axes.plot(tokens, bounds, linestyle=":", color="black", label="one chunk + K, V and their gradients")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the longest sequence")
    axes.set_ylabel("peak memory above the base, MB")
    axes.set_title(f"chunk_tokens {base.chunk_tokens}, hidden {base.hidden}, {base.layers} layers, fp32")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and chunk; within a minute or so")
    parser.add_argument("--only", choices=list(MODES), help="run one mode")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/chunk_memory.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="default: beside the JSON, .png")
    arguments = parser.parse_args()
    base = Case(mode="chunks", num_tokens=0, chunk_tokens=64 if arguments.quick else 512)
    base = base if arguments.quick else replace(base, hidden=256)
    modes = [arguments.only] if arguments.only else MODES
    cases = [replace(base, mode=m, num_tokens=r * base.chunk_tokens) for r in reversed(RATIOS) for m in modes]
    with ThreadPoolExecutor(2 if arguments.quick else 1) as pool:  # memory does not mind a neighbour; speed does
        rows = list(pool.map(run, cases))
    claims = claims_of(rows, base)
    print_table(rows, base)
    print_claims(claims)
    write_report(arguments.json, rows=rows, claims=claims)
    print(f"rows and claims: {arguments.json}")
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed; pip install 'longrail[plots]', or make bench")
    else:
        picture = arguments.plot or arguments.json.with_suffix(".png")
        plot(rows, base, picture)
        print(f"plot: {picture}")
    sys.exit(0 if all(c.met for c in claims) else 1)


if __name__ == "__main__":
    main()
