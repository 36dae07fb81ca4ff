"""Compare a run with what launch.plan predicts of it, and find the --flops and --overhead with which it predicts best.

    python -m launch.calibrate runs/quickstart
    python -m launch.calibrate runs/quickstart --link 1GB/s --json

Reads the run's settings, lengths and metrics; nothing is trained. Of each step the slowest rank's forwards, backwards,
bubble and exchange count, as the plan predicts these; the first step is left out. A resident set of a CPU holds the
libraries too. Exit codes: 0 well, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from launch.compose import active
from launch.config import FinetuneConfig
from launch.data import load_data
from launch.errors import EXIT_WELL, KNOWN_ERRORS, ConfigError, FolderError, as_program, report_error
from launch.files import RunFolder
from launch.metrics import read_metrics
from launch.plan import given_quantity
from launch.plan_costs import CostModel, Machine
from launch.plan_layouts import STAGES, Planner
from launch.plan_records import Layout
from launch.plan_sizes import sizes_of
from launch.recipe import read_config

MOST_STEPS = 32
FEWEST_STEPS = 3
_PARTS = ("compute", "bubble", "exchange")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One step of a run."""

    step: int
    """Optimizer steps done after it."""
    predicted_s: float
    """With the fitted machine."""
    measured_s: float
    predicted_bytes: float
    measured_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What fits a run."""

    layout: Layout
    machine: Machine
    steps: tuple[Compared, ...]

    @property
    def has_flops(self) -> bool:
        """Whether the steps tell how fast the machine computes; not where each layer of a chunk takes the same."""
        return bool(np.isfinite(self.machine.flops))

    @property
    def errors(self) -> NDArray[np.float64]:
        """Return float64 [steps]: predicted seconds over measured ones, less one."""
        return np.array([one.predicted_s / one.measured_s - 1 for one in self.steps])

    @property
    def beyond_bytes(self) -> NDArray[np.float64]:
        """Return float64 [steps]: measured memory beyond the predicted one."""
        return np.array([one.measured_bytes - one.predicted_bytes for one in self.steps])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        errors, beyond = self.errors, np.quantile(self.beyond_bytes, (0, 0.5, 1)).tolist()
        return {
            "flops": self.machine.flops if self.has_flops else None, "overhead_s": self.machine.overhead_s,
            "median_error": float(np.median(abs(errors))), "largest_error": float(abs(errors).max()),
            "beyond_bytes": dict(zip(("least", "median", "most"), beyond, strict=True)),
            "layout": self.layout.settings(FinetuneConfig()), "data_ranks": self.layout.data,
            "steps": [{name: getattr(one, name) for name in Compared.__slots__} for one in self.steps],
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print it; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        link, latency_s = given_quantity(args, "link", "B"), given_quantity(args, "latency", "s")
        found = calibrate(RunFolder(args.folder), link=link, latency_s=latency_s)
    except (*KNOWN_ERRORS, ValueError) as error:
        return report_error(0, error)
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(Console(soft_wrap=True, highlight=False, width=120), found)
    return EXIT_WELL


def calibrate(run: RunFolder, *, link: float, latency_s: float) -> Calibration:
    """Fit a machine to a run. Raises ConfigError for one that launch.plan does not plan, FolderError for no run."""
    if not run.config.exists() or not run.facts.exists():
        raise FolderError(f"{run.path} has no config.json and job.json; give the folder of a run (run.folder)")
    config = read_config(["--config", str(run.config)], prog="python -m launch.calibrate", description="")
    world = json.loads(run.facts.read_text(encoding="utf-8"))["world_size"]
    lengths = np.asarray(load_data(config).train.lengths, dtype=np.int64)
    layout = layout_of(config, world)
    lines = chosen(read_metrics(run.metrics), whole_steps=len(lengths) // config.chunks.global_batch)
    if len(lines) < FEWEST_STEPS:
        raise FolderError(
            f"{run.path} has {len(lines)} steps that were timed by rank, behind the first and within the first epoch; "
            f"at least {FEWEST_STEPS} are needed"
        )
    machine = Machine(
        devices=world, memory_bytes=np.inf, flops=1.0, link_bytes_per_s=link, latency_s=latency_s, overhead_s=0.0
    )
    bf16, lora = config.model.precision == "bf16", config.lora.rank is not None
    model = CostModel(sizes=sizes_of(config), machine=machine, bf16=bf16, lora=lora)
    features = tuple(active(config))
    planner = Planner(model, lengths, config.chunks.global_batch, config.run.seed, features)
    return fitted(planner, layout, lines)


def layout_of(config: FinetuneConfig, world: int) -> Layout:
    """Return how a job was laid out. Raises ConfigError for what launch.plan does not predict."""
    pipeline, ep = config.pipeline, config.moe.ep or 1
    stages = pipeline.ranks * STAGES.get(pipeline.schedule, 1)
    for wrong, what in (
        (pipeline.schedule == "roundpipe", "pipeline.schedule roundpipe: python -m pipeline plan plans that"),
        (config.model.library != "transformers", "model.library megatron"),
        (config.moe.esp > 1, "moe.esp"),
        (pipeline.ranks > 1 and pipeline.num_stages != stages, f"{pipeline.num_stages} pipeline.stages"),
        (pipeline.recompute, "pipeline.recompute"),
    ):
        if wrong:
            raise ConfigError(f"launch.plan predicts no job with {what}")
    return Layout(
        pp=pipeline.ranks, ep=ep, data=world // pipeline.ranks, engine=config.engine, schedule=pipeline.schedule,
        chunk_tokens=config.chunks.chunk_tokens, retain=config.chunks.retain,
    )  # fmt: skip


def chosen(lines: Sequence[Mapping[str, Any]], *, whole_steps: int) -> list[Mapping[str, Any]]:
    """Return at most MOST_STEPS lines, evenly, of steps that were timed by rank, the first step left out."""
    timed = [line for line in lines if "ranks" in line and 1 < line["step"] <= whole_steps]
    if len(timed) <= MOST_STEPS:
        return timed
    return [timed[n] for n in np.linspace(0, len(timed) - 1, MOST_STEPS).round().astype(int).tolist()]


def fitted(planner: Planner, layout: Layout, lines: Sequence[Mapping[str, Any]]) -> Calibration:
    """Fit the seconds of a product and of a layer's forward, by least squares of relative errors, none below 0."""
    numbers, measured = [line["step"] - 1 for line in lines], np.array([_seconds(line) for line in lines])
    exchange_s = planner.reduce_s(layout, layout.ep)
    parts = np.array([
        [at.step(layout, at.cut(number, layout)).seconds for number in numbers]
        for at in (_on(planner, flops=1.0, overhead_s=0.0), _on(planner, flops=np.inf, overhead_s=1.0))
    ])  # fmt: skip
    product_s, overhead_s = least_squares(parts / measured, 1 - exchange_s / measured)
    there = _on(planner, flops=1 / product_s if product_s else np.inf, overhead_s=overhead_s)
    steps = []
    for line, number, seconds in zip(lines, numbers, measured.tolist(), strict=True):
        found = there.step(layout, there.cut(number, layout))
        steps.append(
            Compared(
                step=line["step"],
                predicted_s=found.seconds + exchange_s,
                measured_s=seconds,
                predicted_bytes=found.memory_bytes,
                measured_bytes=max(line["ranks"]["peak_bytes"]),
            )
        )
    return Calibration(layout=layout, machine=there.model.machine, steps=tuple(steps))


def _on(planner: Planner, *, flops: float, overhead_s: float) -> Planner:
    machine = replace(planner.model.machine, flops=flops, overhead_s=overhead_s)
    return replace(planner, model=replace(planner.model, machine=machine), known={})


def _seconds(line: Mapping[str, Any]) -> float:
    return max(sum(parts) for parts in zip(*(line["ranks"][name] for name in _PARTS), strict=True))


def least_squares(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, float]:
    """Return the two factors, none below 0, of rows float64 [2, steps] that come nearest to `wanted`."""
    (both, *_) = np.linalg.lstsq(rows.T, wanted, rcond=None)
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [max(0.0, float(row @ wanted / (row @ row))) for row in rows]
    options = [(alone[0], 0.0), (0.0, alone[1])]
    return min(options, key=lambda pair: float(np.square(np.array(pair) @ rows - wanted).sum()))


def show(console: Console, found: Calibration) -> None:
    """Print some steps as a table, the fit, and what to give to launch.plan."""
    table = Table(box=None)
    for name in ("step", "predicted s", "measured s", "predicted MB", "measured MB"):
        table.add_column(name, justify="right")
    for one in found.steps[:: max(1, len(found.steps) // 8)]:
        seconds = (f"{one.predicted_s:.3g}", f"{one.measured_s:.3g}")
        table.add_row(str(one.step), *seconds, *(f"{b / 1e6:,.1f}" for b in (one.predicted_bytes, one.measured_bytes)))
    console.print(table)
    errors, beyond = abs(found.errors), found.beyond_bytes / 1e6
    console.print(
        f"{len(found.steps)} steps: predicted seconds are off by {np.median(errors):.1%} (median), at most by "
        f"{errors.max():.1%}; memory beyond the predicted: {beyond.min():,.0f} to {beyond.max():,.0f} MB"
    )
    flops = f"--flops {found.machine.flops:.3g} " if found.has_flops else ""
    console.print(f"for launch.plan: {flops}--overhead {found.machine.overhead_s:.3g}s")
    if not flops:
        console.print("--flops cannot be told: layers take as long for few tokens as for many; use larger chunks")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="the folder of a run, as in run.folder")
    parser.add_argument("--link", default="50GB/s", help="what a device sends, and receives, a second; 50GB/s")
    parser.add_argument("--latency", default="10us", help="of one message; 10us")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    as_program(main)
