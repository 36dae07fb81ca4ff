"""Propose how to lay a recipe's job out: data, pipeline and expert parallel, engine, chunks, schedule; and say why.

    python -m launch.plan --config recipes/NAME.yaml --devices 64 --device-memory 80GB --link 50GB/s --flops 200TF
    python -m launch.plan ... --lengths lengths.json --json      lengths of the samples from a file, not from the data
    python -m launch.plan ... --chunks.global_batch 512          other settings of the recipe, as launch.finetune has

Nothing is trained, no weight is read and no device is needed: the model's configuration, the lengths of the samples,
the packages' own planners and simulators. Exit codes: 0 well, 1 nothing fits, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from chunkflow.lengths import DISTRIBUTIONS
from launch.compose import active
from launch.config import FinetuneConfig
from launch.data import load_data
from launch.errors import EXIT_BAD_INPUT, EXIT_CHECK_FAILED, EXIT_WELL, KNOWN_ERRORS, ConfigError, as_program
from launch.plan_costs import ASSUMPTIONS, CostModel, Machine
from launch.plan_layouts import FULLEST, Planner
from launch.plan_records import Estimate, size
from launch.plan_sizes import sizes_of
from launch.recipe import read_config

_NAMES = {"B": "bytes", "F": "flops", "s": "seconds"}
_WRITTEN = {"B": "80GB, 64GiB, or 50GB/s for a link", "F": "200TF", "s": "10us or 2ms"}
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_DECIDED = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "state_aware", "whole", "roundpipe", "experts")
_WORDS = {
    "pp": "pipeline ranks", "ep": "expert ranks", "engine": "engine", "schedule": "schedule",
    "chunk_tokens": "chunk_tokens", "retain": "retain",
}  # fmt: skip
_SAMPLES = 200_000
_LENGTHS_HELP = "a .json or .npy list of lengths, what chunkflow lengths --json prints, or " + ", ".join(DISTRIBUTIONS)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, and print it; return the exit code."""
    args, rest = _parser().parse_known_args(argv)
    try:
        config = read_config(["--config", str(args.config), *rest], prog="python -m launch.plan", description="")
        planner = _planner(config, args)
    except (*KNOWN_ERRORS, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    begun = time.perf_counter()
    try:
        best = planner.best()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CHECK_FAILED
    why = reasons(planner, best)
    while (faster := planner.fastest()).step_s < best.step_s:  # what the reasons looked at may be faster still
        best, why = faster, reasons(planner, faster)
    if args.json:
        print(json.dumps(as_json(planner, best, config, why, time.perf_counter() - begun), indent=1))
    else:
        show(Console(soft_wrap=True, highlight=False, width=120), planner, best, config, why)
    return EXIT_WELL


def quantity(text: str, unit: str) -> float:
    """Read `80GB`, `50GB/s` or `64GiB` in "B", `200TF` in "F", `10us` in "s". Raises ValueError."""
    form = r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(?:(us|ms|s)|([kMGTP]i?)?(B|F|FLOPS)?(?:/s)?)"
    match = re.fullmatch(form, text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no quantity; write {_WRITTEN[unit]}")
    number, seconds, prefix, of = match.groups()
    if number != "0" and ("s" if seconds else of or "?")[0] != unit:
        raise ValueError(f"{text!r} is not in {_NAMES[unit]}; write {_WRITTEN[unit]}")
    return float(number) * ({"us": 1e-6, "ms": 1e-3, "s": 1.0}[seconds] if seconds else _UNITS[prefix or ""])


def given_quantity(args: argparse.Namespace, name: str, unit: str) -> float:
    """Return what a flag of a command says, in "B", "F" or "s". Raises ConfigError that names the flag."""
    try:
        return quantity(getattr(args, name), unit)
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')}: {error}") from error


def reasons(planner: Planner, best: Estimate) -> list[str]:
    """Return why each dimension is what it is: the nearest other choice, and what is wrong with it."""
    cap, lines = planner.model.machine.memory_bytes, []
    for name, others in planner.others(best).items():
        chosen = getattr(best.layout, name)
        by_value: dict[Any, Estimate] = {}
        for one in sorted(others, key=lambda one: (not planner.fits(one), one.step_s)):
            by_value.setdefault(getattr(one.layout, name), one)
        said = []
        for value, one in sorted(by_value.items(), key=lambda pair: (not planner.fits(pair[1]), pair[1].step_s))[:3]:
            if not planner.fits(one):
                said.append(f"{value} needs {size(one.memory_bytes)} of {size(cap)}")
            else:
                said.append(f"{value} takes {one.step_s / best.step_s:.2f} times as long")
        if said:
            lines.append(f"{_WORDS[name]} {chosen}: {'; '.join(said)}")
    if best.balance < 0.8:
        lines.append(
            f"data-parallel ranks are busy {best.balance:.0%} of the time: {planner.batch} samples a step over "
            f"{best.layout.data} ranks; a larger chunks.global_batch, or fewer devices, would even that out"
        )
    return lines


def as_json(
    planner: Planner, best: Estimate, recipe: FinetuneConfig, why: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Return the plan as JSON values."""
    sizes = planner.model.sizes
    tried = sorted(planner.known.values(), key=lambda one: (not planner.fits(one), one.step_s))
    return {
        "chosen": best.to_json() | {"tokens_per_s": tokens_of(planner) / best.step_s},
        "settings": settings_of(planner, best, recipe),
        "why": list(why),
        "tried": [one.to_json() | {"fits": planner.fits(one)} for one in tried],
        "model": {"name": sizes.name, "parameters": sizes.parameters, "layers": len(sizes.layers)},
        "assumptions": list(ASSUMPTIONS),
        "seconds": seconds,
    }


def tokens_of(planner: Planner) -> float:
    """Return the tokens of a mean step among those that were looked at."""
    every = {step: chunks.lengths.sum() for (step, *_), chunks in planner.cuts.items() if step != FULLEST}
    return float(np.mean(list(every.values())))


def show(console: Console, planner: Planner, best: Estimate, recipe: FinetuneConfig, why: Sequence[str]) -> None:
    """Print the best layouts as a table, the reasons, and the settings that make the first."""
    sizes, machine = planner.model.sizes, planner.model.machine
    console.print(
        f"{sizes.name}: {sizes.parameters:,} parameters; {len(planner.lengths):,} samples, the longest "
        f"{int(planner.lengths.max()):,} tokens; {planner.batch} a step on {machine.devices} devices of "
        f"{size(machine.memory_bytes)}"
    )
    table = Table(box=None)
    for name in ("dp", "pp", "ep", "engine", "schedule", "chunk", "retain", "step s", "tokens/s", "bubble", "memory"):
        table.add_column(name, justify="left" if name in ("engine", "schedule") else "right", no_wrap=True)
    tried = sorted((one for one in planner.known.values() if planner.fits(one)), key=lambda one: one.step_s)
    tokens = tokens_of(planner)
    for one in tried[:8]:
        at = one.layout
        table.add_row(
            str(at.data), str(at.pp), str(at.ep), at.engine, at.schedule if at.pp > 1 else "-", str(at.chunk_tokens),
            str(at.retain), f"{one.step_s:.3g}{'' if one.simulated else ' (est.)'}", f"{tokens / one.step_s:,.0f}",
            f"{one.bubble:.1%}", size(one.memory_bytes),
        )  # fmt: skip
    console.print(table)
    console.print("Other choices, with all else as in the first (pipeline ranks: with whatever is best there):")
    for line in why:
        console.print(f"  - {line}")
    flags = (f"--{key} {flag_value(value)}" for key, value in settings_of(planner, best, recipe).items())
    console.print(f"settings: {' '.join(flags)}")


def settings_of(planner: Planner, best: Estimate, recipe: FinetuneConfig) -> dict[str, Any]:
    """Return the settings that make the best layout of the recipe, where it has others."""
    return best.layout.settings(recipe) | {"chunks.pair_cost": float(f"{planner.model.pair_cost:.3g}")}


def flag_value(value: Any) -> str:
    """Return a setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _planner(config: FinetuneConfig, args: argparse.Namespace) -> Planner:
    machine = Machine(
        devices=args.devices,
        memory_bytes=given_quantity(args, "device_memory", "B"),
        flops=given_quantity(args, "flops", "F"),
        link_bytes_per_s=given_quantity(args, "link", "B"),
        latency_s=given_quantity(args, "latency", "s"),
        overhead_s=given_quantity(args, "overhead", "s"),
    )
    if machine.devices < 1 or not min(machine.memory_bytes, machine.flops, machine.link_bytes_per_s) > 0:
        raise ConfigError("--devices, --device-memory, --flops and --link are more than 0")
    lengths = _lengths(config, args.lengths)
    bf16, lora = config.model.precision == "bf16", config.lora.rank is not None
    model = CostModel(sizes=sizes_of(config), machine=machine, bf16=bf16, lora=lora)
    made = ("experts",) if config.moe.num_experts is not None else ()  # of a dense model: its layers are moe's own
    features = (*(name for name in active(config) if name not in _DECIDED), *made)
    return Planner(model, lengths, config.chunks.global_batch, config.run.seed, features)


def _lengths(config: FinetuneConfig, given: str | None) -> NDArray[np.int64]:
    if given is None:
        return np.asarray(load_data(config).train.lengths, dtype=np.int64)
    if given in DISTRIBUTIONS:
        return DISTRIBUTIONS[given](_SAMPLES, seed=0)
    if not Path(given).is_file():
        raise ConfigError(f"--lengths {given} is no file, and none of {', '.join(DISTRIBUTIONS)}")
    read = np.load(given) if given.endswith(".npy") else json.loads(Path(given).read_text(encoding="utf-8"))
    lengths = (_of_bars(given, read) if isinstance(read, dict) else np.array(read)).astype(np.int64)
    if lengths.ndim != 1 or not len(lengths) or lengths.min() < 1:
        raise ConfigError(f"--lengths {given} holds no list of lengths, each at least 1")
    return lengths


def _of_bars(given: str, histogram: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return lengths of which `chunkflow lengths --json` would print these bars: the mean of each, and the longest."""
    try:
        bars = [(bar["sequences"], bar["tokens"]) for bar in histogram["bars"] if bar["sequences"]]
        means = [round(tokens / sequences) for sequences, tokens in bars]
        lengths = np.repeat(np.array(means, dtype=np.int64), [sequences for sequences, _ in bars])
        lengths[-1:] = histogram["longest"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"--lengths {given} is no histogram of chunkflow lengths --json: {error}") from error
    return lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, help="a recipe: its model, data and batch")
    parser.add_argument("--devices", type=int, required=True, help="how many there are")
    parser.add_argument("--device-memory", default="80GB", help="of one; 80GB unless given")
    parser.add_argument("--link", default="50GB/s", help="what a device sends, and receives, a second; 50GB/s")
    parser.add_argument("--latency", default="10us", help="of one message; 10us")
    parser.add_argument("--overhead", default="100us", help="of a layer's forward, whatever the chunk's size; 100us")
    parser.add_argument("--flops", default="200TF", help="of one device, sustained, in the recipe's precision; 200TF")
    parser.add_argument("--lengths", help=_LENGTHS_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    as_program(main)
