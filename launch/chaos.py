"""Disturb a job, again and again, and compare what it ends with to an undisturbed run.

    python -m launch.chaos --config recipes/quickstart.yaml --rounds 5
    python -m launch.chaos --config recipes/quickstart.yaml --rounds 20 --kind kill,corrupt --json
    python -m launch.chaos --config RECIPE --rounds 1 --kind shrink --ranks 2 --checkpoint.every 2

A round strikes once by each kind: `kill` (kill -9 of one rank or all), `stop` (SIGSTOP of one), `full-disk`, `corrupt`
(the newest checkpoint, while the job is down), under torchrun's elastic agent, which starts the ranks again. Each run's
weights and metrics must be those of the undisturbed one, to the bit. `shrink` loses a host of an elastic job for good:
the global batches must be the same and every loss within --tolerance.

Settings of launch.finetune may follow, and override the recipe. Linux. As root the full disk is a small one in memory;
otherwise the ranks' files may not grow (RLIMIT_FSIZE).
Exit codes: 0 well, 1 a run did not survive or differs, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from launch.chaos_job import ChaosError
from launch.chaos_kinds import KINDS, SHRINK
from launch.chaos_runs import Chaos
from launch.chaos_table import Tally, table
from launch.config import MOST_SECONDS
from launch.errors import EXIT_CHECK_FAILED, EXIT_WELL, KNOWN_ERRORS, ConfigError, report_error
from launch.recipe import flatten_config, read_config

_TO_THE_BIT = tuple(kind for kind in KINDS if kind != SHRINK)
_LOWEST = {"rounds": 1, "ranks": 1, "deadline-s": 1, "stopped-s": 0, "patience-s": 1, "tolerance": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds and print the counts; return the exit code."""
    args, overrides = _parser().parse_known_args(argv)
    console, begun = Console(stderr=True, soft_wrap=True, highlight=False, markup=False), time.monotonic()
    work, tally = Path(args.work or tempfile.mkdtemp(prefix="chaos-")).absolute(), Tally()
    try:
        chaos = _chaos(args, overrides, work, tally, console)
        chaos.run()
    except ChaosError as error:
        console.print(f"error: {error}\nEverything is kept in {work}")
        return EXIT_CHECK_FAILED
    except KNOWN_ERRORS as error:
        return report_error(0, error)
    finally:
        tally.seconds = time.monotonic() - begun
        if args.work is None:
            with suppress(OSError):  # it holds what a job left
                work.rmdir()
    if args.work is None:
        shutil.rmtree(work)
    if args.json:
        print(json.dumps(tally.to_json()))
    else:
        Console().print(table(tally))
    return EXIT_WELL


def _chaos(args: argparse.Namespace, overrides: list[str], work: Path, tally: Tally, console: Console) -> Chaos:
    flags = [*(["--config", str(args.config)] if args.config else []), *overrides]
    settings = flatten_config(read_config(flags, prog="python -m launch.chaos", description=__doc__ or ""))
    kinds = args.kind.split(",")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ConfigError(f"--kind has {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    for name, low in _LOWEST.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not low <= value <= MOST_SECONDS:
            raise ConfigError(f"--{name} is {value}; it must be at least {low}, and at most {MOST_SECONDS:g}")
    if args.ranks < 2 and {"stop", SHRINK} & set(kinds):
        raise ConfigError("--ranks is 1: a stopped rank is found by another one, and a lost host leaves one; give 2")
    if settings["moe.plan"] == "measure" and set(kinds) - {SHRINK}:
        raise ConfigError(
            "moe.plan is measure, by which a resumed run is the undisturbed one to rounding only; give a file, or null"
        )
    if sys.platform != "linux":
        raise ConfigError(f"this is {sys.platform}; ranks are found and limited by what only Linux has")
    try:
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):  # a run in it would be gone on with, and its output taken for that of ours
            raise ConfigError(f"--work {work} is not empty; give a new folder, or none")
    except OSError as error:
        raise ConfigError(f"--work {work} cannot be used: {error}") from error
    return Chaos(
        flags=flags, settings=settings, kinds=kinds, rounds=args.rounds, ranks=args.ranks, work=work, tally=tally,
        chance=random.Random(args.seed), deadline_s=args.deadline_s, stopped_s=args.stopped_s,
        patience_s=args.patience_s, tolerance=args.tolerance, say=console.print,
        reference=None if args.reference is None else args.reference.absolute(),
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="a recipe of launch.finetune; by default the quickstart")
    parser.add_argument("--rounds", type=int, default=1, help="strikes of each kind")
    default = ",".join(_TO_THE_BIT)
    parser.add_argument("--kind", default=default, help=f"of {', '.join(KINDS)}; by default {default}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--deadline-s", type=float, default=30, help="how long ranks wait for each other")
    parser.add_argument("--stopped-s", type=float, help="let a stopped rank go on after so long; by default never")
    parser.add_argument("--patience-s", type=float, default=300, help="a job that prints nothing for so long hangs")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest relative difference of a loss, for shrink"
    )
    parser.add_argument("--reference", type=Path, help="the folder of an undisturbed run of the same settings")
    parser.add_argument("--work", type=Path, help="an empty folder to run in; by default one that is removed")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that neither ranks nor the small disk outlive it
    sys.exit(main())
