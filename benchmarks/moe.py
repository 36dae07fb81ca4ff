"""Planned overlap of MoE layers, beside the best single r and no overlap, on two emulated hosts.

    python -m benchmarks.moe [--quick] [--only grid|models|real] [--json FILE] [--plot FILE]
    python -m benchmarks.moe --only grid --share 0.5 --rows 0:9 --append     a few minutes of it, added to what is there

`grid` and `models`: two network namespaces of two ranks each; the links between and within them are shaped, and the
communication over them is real and runs through the layer's own autograd function. **The experts' computation is a
calibrated wait** (four ranks share two cores), the same in all ways. Needs root. Time is that of the slowest rank for
dispatch, experts, combine, their backward, and the dense gradients; gate and counts are outside, in all ways alike.
Peers: `fixed` as in Tutel (one r, forward = backward, gradients after; r chosen by measuring), `none` as in
DeepSpeed-MoE (r = 1, gradients after). `real`: two ranks, real experts, no shaping, beside transformers' and
DeepSpeed's own layer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.claims import print_claims, write_report
from benchmarks.moe_claims import claims_of
from benchmarks.moe_layers import SHARES
from benchmarks.ranks import start_rank, wait_for
from moe.netns import TwoHosts, two_hosts, why_not

PARTS = ("grid", "models", "real")
PORT = 29611
DEADLINE_S = 3600


def run_emulated(parts: Sequence[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run parts on four ranks of two emulated hosts; return their rows."""
    net = TwoHosts(name=f"b{os.getpid() % 10**6}")
    chosen = {"quick": arguments.quick, "shares": arguments.share or SHARES, "rows": arguments.rows}
    options = json.dumps({**chosen, "parts": list(parts), "net": net.name})
    with two_hosts(net), tempfile.TemporaryDirectory(prefix="moe-bench-") as folder, ExitStack() as started:
        ranks = []
        for rank in range(4):
            command = [sys.executable, "-m", "benchmarks.moe_rank", str(rank), str(PORT), folder, options]
            process = start_rank(net.command(rank // 2, command), {"GLOO_SOCKET_IFNAME": net.interface})
            started.callback(process.wait)
            started.callback(process.kill)
            ranks.append(process)
        wait_for(ranks, deadline_s=DEADLINE_S)
        return json.loads((Path(folder) / "rows.json").read_text())


def merged(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of an earlier report, those measured again replaced, and the new ones."""
    known = ("part", "layer", "share_target", "work", "way", "step")
    keys = [tuple(row.get(name) for name in known) for row in rows]
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    return [*(row for row in before if tuple(row.get(name) for name in known) not in keys), *rows]


def row_range(text: str) -> list[int]:
    """Read A:B."""
    first, last = text.split(":")
    return [int(first), int(last)]


def print_rows(rows: Sequence[dict[str, Any]], part: str) -> None:
    """Print one line a row: times, T(r*), gains measured and predicted, and what the hardware model allows."""
    table = Table(title=f"{part}: ms, medians of interleaved runs; gains are measured (predicted)")
    for column in ("layer", "comm\nshare", "r fwd/bwd", "fixed\nr", "ours", "T(r*)", "ours/\nT(r*)", "over\nfixed",
                   "over\nnone", "bound\nover none", "gradients\nhidden"):  # fmt: skip
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in (r for r in rows if r["part"] == part):
        chunks = [
            "/".join(map(str, v if isinstance(v, list) else [v]))
            for v in (row["forward_chunks"], row["backward_chunks"])
        ]
        planned = row["hidden_planned"]
        table.add_row(
            row["layer"],
            f"{row['share']:.2f}",
            f"{chunks[0]} {chunks[1]}{' ready' if row['order'] == 'ready' else ''}",
            f"{row['fixed_r']}",
            f"{row['ours_s'] * 1e3:.0f}",
            f"{row['predicted_s'] * 1e3:.0f}",
            f"{row['ours_s'] / row['predicted_s']:.3f}",
            *(
                f"{row[f'{peer}_s'] / row['ours_s']:.2f} ({row[f'predicted_{peer}_s'] / row['predicted_s']:.2f})"
                for peer in ("fixed", "none")
            ),
            f"{row['none_s'] / row['bound_s']:.2f}",
            f"{row['hidden']:.2f} ({planned:.2f})",
        )
    Console(width=170).print(table)


def print_real(rows: Sequence[dict[str, Any]]) -> None:
    """Print the layers with real experts."""
    table = Table(title="real: two ranks, real experts, ms of forward and backward, medians of interleaved runs")
    for column in ("work", "way", "step", "ms", "ours is", "80% of rounds", "note"):
        table.add_column(column)
    for row in (r for r in rows if r["part"] == "real"):
        ms = f"{row['seconds'] * 1e3:.1f}" if row["seconds"] is not None else "-"
        ours, rounds = "-", "-"
        if row["speedup"] is not None:
            ours, rounds = f"{row['speedup']:.3f}x", "{:.2f} to {:.2f}".format(*row["rounds"])
        table.add_row(row["work"], row["way"], row["step"], ms, ours, rounds, row["note"])
    Console(width=170).print(table)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw measured over predicted gain of every row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    for peer, marker in (("fixed", "o"), ("none", "x")):
        points = [
            (r[f"predicted_{peer}_s"] / r["predicted_s"], r[f"{peer}_s"] / r["ours_s"])
            for r in rows
            if r["part"] != "real"
        ]
        axes.plot(*zip(*points, strict=True), marker, linestyle="none", label=f"over {peer}")
    axes.axline((1, 1), slope=1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("predicted gain")
    axes.set_ylabel("measured gain")
    axes.set_title("emulated links, experts as waits")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer, smaller layers and rounds")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--share", type=float, action="append", choices=SHARES, help="only this share; repeatable")
    parser.add_argument("--rows", type=row_range, default=[0, 999], metavar="A:B", help="only these layers of a part")
    parser.add_argument("--append", action="store_true", help="add the rows to those in the JSON file")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/moe.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="default: beside the JSON, .png")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else list(PARTS)
    emulated = [part for part in parts if part != "real"]
    if emulated and (reason := why_not()) is not None:
        print(f"cannot run {' and '.join(emulated)}: {reason}; run as root on Linux, or --only real", file=sys.stderr)
        sys.exit(2)
    # So that hosts and ranks are gone when someone ends this, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = run_emulated(emulated, arguments) if emulated else []
    if "real" in parts:
        from benchmarks.moe_peers import run_real

        rows += run_real(quick=arguments.quick)
    if arguments.append:
        rows = merged(arguments.json, rows)
    for part in ("grid", "models"):
        if any(row["part"] == part for row in rows):
            print_rows(rows, part)
    if any(row["part"] == "real" for row in rows):
        print_real(rows)
    claims = claims_of(rows, quick=arguments.quick)
    print_claims(claims)
    write_report(arguments.json, rows=rows, claims=claims)
    print(f"rows and claims: {arguments.json}")
    if any(row["part"] != "real" for row in rows):
        picture = arguments.plot or arguments.json.with_suffix(".png")
        plot(rows, picture)
        print(f"plot: {picture}")
    sys.exit(0 if all(c.met for c in claims) else 1)


if __name__ == "__main__":
    main()
