"""Pipelines: plans in simulation, RoundPipe on emulated devices and real ranks, state-aware 1F1B; with their peers.

    python -m benchmarks.pipeline [--quick] [--only PART] [--model NAME] [--rounds N] [--json FILE] [--append]

simulated    RoundPipe's planner on the published cost tables, 8 devices: bubble of one step
emulated     its runtime on 2, 4 and 8 emulated devices (waits in the place of layers), synchronous and asynchronous
real         its runtime on two ranks, real layers, against torch.distributed.pipelining under one memory cap
capped       a model several times as large as its devices, on two ranks
state-aware  state-aware 1F1B on `lmsys` lengths against 1F1B on whole sequences: simulated, and on two ranks

`--append` adds the rows to those that FILE has, in the place of the same ones; each has the load average at its end.
Plans are kept in a file (`--plans`), so that a row need not be planned again; `simulated` always plans. Exit codes: 0,
or 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pipeline_emulated, pipeline_real, pipeline_simulated, pipeline_state_aware
from benchmarks.claims import Claim, print_claims, write_report
from benchmarks.pipeline_options import Options
from benchmarks.pipeline_plans import PlanFile

Rows = Sequence[dict[str, Any]]
KEYS = ("part", "model", "devices", "mode", "quick")
"""What makes two rows the same measurement."""


@dataclass(frozen=True, slots=True)
class Part:
    """How a part is measured and told."""

    run: Callable[[Options], Iterator[dict[str, Any]]]
    show: Callable[[Rows], None]
    claims: Callable[[Rows], list[Claim]]


PARTS = {
    "simulated": Part(pipeline_simulated.run, pipeline_simulated.show, pipeline_simulated.claims_of),
    "emulated": Part(pipeline_emulated.run, pipeline_emulated.show, pipeline_emulated.claims_of),
    "real": Part(pipeline_real.run_real, pipeline_real.show_real, pipeline_real.claims_of_real),
    "capped": Part(pipeline_real.run_capped, pipeline_real.show_capped, pipeline_real.claims_of_capped),
    "state-aware": Part(pipeline_state_aware.run, pipeline_state_aware.show, pipeline_state_aware.claims_of),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller work and searches: a minute")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; repeatable")
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="only these rows; repeatable")
    parser.add_argument("--devices", type=int, nargs="*", default=(), help="emulated: numbers of devices")
    parser.add_argument("--modes", nargs="*", choices=pipeline_emulated.MODES, default=(), help="asynchronous: 8 only")
    parser.add_argument("--rounds", type=int, default=0, help="default: of each part")
    parser.add_argument("--effort", type=float, default=1.0, help="of the planner's search")
    parser.add_argument("--plans", type=Path, default=Path("runs/benchmarks/pipeline_plans.json"), metavar="FILE")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/pipeline.json"), metavar="FILE")
    parser.add_argument("--append", action="store_true", help="add the rows to those in the JSON file")
    parser.add_argument("--report", action="store_true", help="measure nothing; report what is in the JSON file")
    given = parser.parse_args(arguments)
    options = Options(
        quick=given.quick, models=tuple(given.model), devices=tuple(given.devices), modes=tuple(given.modes),
        rounds=given.rounds, effort=given.effort, plans=PlanFile(given.plans),
    )  # fmt: skip
    # So that ranks are gone when someone ends this, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = []
    if (given.append or given.report) and given.json.exists():
        rows = json.loads(given.json.read_text())["rows"]
    for name in [] if given.report else given.only or PARTS:
        for row in PARTS[name].run(options):
            row = {**row, "quick": given.quick, "load_average": os.getloadavg()[0]}
            rows = [*_others(rows, row), row]
            write_report(given.json, rows=rows, claims=[])
    claims = []
    for name, part in PARTS.items():
        if found := [row for row in rows if row["part"] == name]:
            part.show(found)
            claims += part.claims(found)
    print_claims(claims)
    write_report(given.json, rows=rows, claims=claims)
    print(f"rows and claims: {given.json}")
    sys.exit(0 if all(claim.met for claim in claims) else 1)


def _others(rows: Rows, new: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in rows if any(row.get(key) != new.get(key) for key in KEYS)]


if __name__ == "__main__":
    main()
