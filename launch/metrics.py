"""What is measured of a step, kept as one JSON line each in metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from launch.files import write_lines
from launch.step_times import straggler_ratio

_MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step, over all ranks. A line without a loss is an evaluation before the first step."""

    step: int
    """Optimizer steps done after this one."""
    loss: float | None = None
    """Mean over the step's targets, before the step."""
    lr: float | None = None
    grad_norm: float | None = None
    """Before clipping."""
    tokens: int = 0
    supervised_tokens: float = 0
    """Sum of the loss weights."""
    seconds: float = 0.0
    """From the end of the step before, waiting for data included, without evaluation and checkpoint."""
    fill: float | None = None
    """Tokens per token of room in the step's chunks."""
    split_tokens: int = 0
    """Tokens of sequences longer than a chunk."""
    longest: int = 0
    """Tokens of the step's longest sequence."""
    peak_bytes: int | None = None
    """Largest memory of a rank during the step: its resident set, or what torch allocated on its accelerator."""
    beside_save: bool = False
    """Whether a checkpoint was being written when the step began."""
    eval_loss: float | None = None
    """Mean over the held-out targets after the step, when evaluated."""
    ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By rank: seconds of each part of the step (`launch.step_times`), and `peak_bytes`. Of up to 64 ranks."""
    more: Mapping[str, float] = field(default_factory=dict)
    """What else was measured, by name: the load of experts."""
    notes: tuple[str, ...] = ()
    """What is to be said after the step."""

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens trained per second, over all ranks."""
        return self.tokens / self.seconds if self.seconds else None

    def with_ranks(self, ranks: Mapping[str, Sequence[float]]) -> StepMetrics:
        """Return these with what every rank measured, and what that comes to."""
        means = {f"seconds.{name}": sum(row) / len(row) for name, row in ranks.items() if name != "peak_bytes"}
        return replace(
            self,
            peak_bytes=int(max(ranks["peak_bytes"])) or None,
            more={**self.more, **means, "straggler": straggler_ratio(ranks["compute"])},
            ranks=ranks if len(ranks["compute"]) <= _MOST_RANKS else {},
        )

    def with_experts(self, loads: Mapping[str, float], notes: tuple[str, ...]) -> StepMetrics:
        """Return these with the load of experts, and what is to be said of it."""
        return replace(self, more={**self.more, **loads}, notes=notes)

    def values(self) -> dict[str, float]:
        """Return what was measured, by name; a line without a loss has an evaluation only."""
        values = {**asdict(self), "tokens_per_s": self.tokens_per_s}
        values.update(values.pop("more"))
        values["beside_save"] = float(self.beside_save)
        del values["notes"], values["ranks"]
        names = list(values) if self.loss is not None else ["step", "eval_loss"]
        return {name: values[name] for name in names if values[name] is not None}

    def to_json(self) -> str:
        """Return one line of metrics.jsonl."""
        return json.dumps(self.values() | ({"ranks": {**self.ranks}} if self.ranks else {}))


class MetricsLog:
    """Appends to metrics.jsonl. Opened on one rank only."""

    def __init__(self, path: Path, *, after_step: int | None) -> None:
        """Keep the lines up to `after_step`, from which the run goes on; None starts an empty file."""
        kept = [] if after_step is None else [line for line in read_metrics(path) if line["step"] <= after_step]
        write_lines(path, [json.dumps(line) for line in kept])
        self.missing = (after_step or 0) - sum("loss" in line for line in kept)
        """Steps before the resumed one of which the file has no line."""
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append one line, at once visible to readers."""
        self._file.write(metrics.to_json() + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the lines durable: a checkpoint must not be younger than its metrics."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, [] when there is none; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
