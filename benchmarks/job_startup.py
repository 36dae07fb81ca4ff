"""The third part of `benchmarks.job`: from the start of torchrun to the first step, beyond imports and the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.job_data import flags, mix, model_folder
from benchmarks.job_runs import torchrun
from benchmarks.job_train import common

Row = dict[str, Any]
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
DEADLINE_S = 900


@dataclass(frozen=True, slots=True)
class Case:
    """A job whose start is measured."""

    name: str
    recipe: str | None
    model: str | None
    """What a bare script loads."""
    settings: Mapping[str, object]


def cases(*, quick: bool) -> list[Case]:
    """Return the quickstart, and a cut of SmolLM2 on the functions that its recipe names."""
    if quick:
        model = model_folder(quick=True)
        data = mix(model, count=80, quick=True)
        return [Case("tiny", None, str(model), common(model, data.path, Path()))]
    cut = str(model_folder(quick=False))
    return [
        Case("quickstart", "quickstart.yaml", None, {}),
        Case("smollm2, 4 layers", "smollm2.yaml", cut, {"model.path": cut, "model.precision": "fp32"}),
        Case("smollm2, whole", "smollm2.yaml", "smollm2", {}),
    ]


def measure(*, numbers: Sequence[int], quick: bool) -> Iterator[Row]:
    """Start every case once with nothing cached, then in the rounds of these numbers; a bare script before each."""
    for case in cases(quick=quick):
        with tempfile.TemporaryDirectory(prefix="bench-job-start-") as folder:
            for number in (numbers[0] - 1, *numbers):
                bare = torchrun("benchmarks.job_bare", [case.model] if case.model else [], deadline_s=DEADLINE_S)
                ours = started(case, Path(folder), number)
                row = {
                    "part": "startup",
                    "case": case.name,
                    "round": number,
                    "cached": number >= numbers[0],
                    "quick": quick,
                }
                yield {**row, **beyond(bare, ours)}


def started(case: Case, folder: Path, number: int) -> list[Row]:
    """Run one step of a case."""
    settings = {
        **case.settings, "run.folder": folder / f"run-{number}", "data.cache": folder / "cache", "run.steps": 1,
    }  # fmt: skip
    recipe = [] if case.recipe is None else ["--config", str(RECIPES / case.recipe)]
    return torchrun("benchmarks.job_ours", [*recipe, *flags(settings)], deadline_s=DEADLINE_S)


def beyond(bare: Sequence[Row], ours: Sequence[Row]) -> dict[str, float]:
    """Return the seconds to the first step, what a bare script takes of them, and what is left; slowest ranks count.

    The held-out loss before the first step is no start-up: it is told apart.
    """
    bare_s = max(rank["loaded"] - rank["launched"] for rank in bare)
    first_s = max(rank["steps"][0] - rank["launched"] for rank in ours)
    evaluating_s = max(rank["evaluating_s"] for rank in ours)
    rank = ours[0]
    moments = {
        "torchrun": rank["importing"] - rank["launched"], "imports": rank["imported"] - rank["importing"],
        "settings and world": rank["prepared"][0][0] - rank["imported"],
        "data, model and job": rank["prepared"][0][1] - rank["prepared"][0][0],
        "folder and checkpoints": rank["assembled"] - rank["prepared"][0][1],
        "first batch": rank["steps"][0] - rank["assembled"] - rank["evaluating_s"],
    }  # fmt: skip
    return {
        "seconds": first_s - evaluating_s - bare_s, "first_step_s": first_s, "bare_s": bare_s,
        "bare_imported_s": max(rank["imported"] - rank["launched"] for rank in bare), "evaluating_s": evaluating_s,
        **{f"moment.{name}": seconds for name, seconds in moments.items()},
    }  # fmt: skip
