"""Where things are in a run's folder, and replacing a file or folder there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def of(cls, name: str) -> RunFolder:
        """Return the folder of that name; of a symbolic link what it leads to, so that one folder has one lock."""
        path = Path(name)
        return cls(path.resolve() if os.path.islink(path) else path)  # False for what is no name: who writes says so

    @property
    def lock(self) -> Path:
        """Held by the job that writes here; beside the folder, which may be moved."""
        return self.path.with_name(f"{self.path.name}.lock")

    @property
    def checkpoints(self) -> Path:
        """What a resume reads."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def trace(self) -> Path:
        """What ran when in the last step that was evaluated: a file a rank, and a pipeline's schedule; of layers whose
        experts are spread another file a rank."""
        return self.path / "trace"

    def trace_of(self, rank: int) -> Path:
        """Return where a rank writes its events."""
        return self.trace / f"rank-{rank:05}.jsonl"

    @property
    def config(self) -> Path:
        """The settings last used, readable as a recipe."""
        return self.path / "config.json"

    @property
    def summary(self) -> Path:
        """What a finished run amounts to."""
        return self.path / "summary.json"

    @property
    def facts(self) -> Path:
        """The data, the model and the machines, for the report."""
        return self.path / "job.json"

    @property
    def report(self) -> Path:
        """The run as a page for a browser."""
        return self.path / "report.html"

    @property
    def expert_plans(self) -> Path:
        """The last measured plans of expert-parallel layers, readable as `moe.plan`."""
        return self.path / "moe_plan.json"

    @property
    def expert_profile(self) -> Path:
        """What those were made from, readable by `python -m moe plan` and `simulate`."""
        return self.path / "moe_profile.json"

    @property
    def model(self) -> Path:
        """The trained model and its tokenizer, as transformers saves them."""
        return self.path / "model"

    def move_aside(self) -> Path | None:
        """Rename the folder to the next free name and return that; None when there is no folder."""
        if not self.path.exists():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once."""
    write_lines(path, [json.dumps(value, indent=2)])


def write_lines(path: Path, lines: list[str]) -> None:
    """Replace a text file at once: a reader, or a crash, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace a folder by what `fill` writes into an empty one. A crash leaves the old one, the new one, or none.

    Weights are made as readable as the folder is, by the umask: safetensors lets only their owner read them.
    """
    partial = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for weights in partial.rglob("*.safetensors"):
        weights.chmod(partial.stat().st_mode & 0o666)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
