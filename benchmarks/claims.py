"""What a benchmark claims, as rows that a program can read."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One target a benchmark is there to show, met or missed."""

    name: str
    value: float
    unit: str
    target: str
    """The target as it was set, for instance `<= 1.15`."""
    bound: float | None
    """What a model of the hardware allows at best, in the same unit; None where there is no such model."""
    met: bool
    note: str


def write_report(path: Path, *, rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> None:
    """Write every row and claim, and what machine they are from, as JSON."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    report = {"machine": machine, "rows": list(rows), "claims": [asdict(c) for c in claims]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # numpy's scalars come out of compiled planners and medians
    path.write_text(json.dumps(report, indent=1, default=lambda scalar: scalar.item()) + "\n")


def print_claims(claims: Sequence[Claim]) -> None:
    """Print one line a claim."""
    for claim in claims:
        verdict = "met" if claim.met else "MISSED"
        bound = "" if claim.bound is None else f", bound {claim.bound:.3g}"
        unit = f" {claim.unit}" if claim.unit else ""
        print(f"{claim.name}: {claim.value:.3f}{unit} (target {claim.target}{bound}): {verdict}. {claim.note}")
