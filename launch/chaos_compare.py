"""Whether a disturbed run is the undisturbed one: weights to the bit, or global batches and about the losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.chaos_job import ChaosError
from launch.errors import ConfigError
from launch.files import RunFolder
from launch.metrics import read_metrics

OF_THE_MACHINE = ("seconds", "tokens_per_s", "peak_bytes", "straggler", "ranks", "beside_save")
_OF_THE_BATCH = ("tokens", "supervised_tokens", "longest", "lr")
_MAY_DIFFER = ("run.folder", "run.log_every", "run.timeout_s", "checkpoint.", "pipeline.timeout_s", "moe.timeout_s")


def weights(folder: RunFolder) -> dict[str, bytes]:
    """Return every file of the exported model."""
    return {str(p.relative_to(folder.model)): p.read_bytes() for p in sorted(folder.model.rglob("*")) if p.is_file()}


def curve(folder: RunFolder) -> list[dict[str, Any]]:
    """Return everything a run measured but the time and the memory it took."""
    lines = read_metrics(folder.metrics)
    return [{key: value for key, value in line.items() if key not in _times(line)} for line in lines]


def require_same(found: RunFolder, wanted: RunFolder) -> None:
    """Raise ChaosError unless model and metrics are those of the undisturbed run, to the bit."""
    ours, theirs = curve(found), curve(wanted)
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            names = sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))
            raise ChaosError(f"{found.path}: step {mine['step']} differs from {wanted.path} in {', '.join(names)}")
    if len(ours) != len(theirs):
        raise ChaosError(f"{found.path} has {len(ours)} lines of metrics, and {wanted.path} has {len(theirs)}")
    left, right = weights(found), weights(wanted)
    if left != right or not left:
        names = sorted(name for name in {*left, *right} if left.get(name) != right.get(name))
        raise ChaosError(f"{found.model}: {', '.join(names) or 'nothing is there'}; another model than {wanted.model}")


def largest_difference(found: RunFolder, wanted: RunFolder) -> float:
    """Return the largest relative difference of a loss. Raises ChaosError when a global batch is another."""
    ours, theirs, largest = curve(found), curve(wanted), 0.0
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        raise ChaosError(f"{found.path} and {wanted.path} have other steps")
    for mine, other in zip(ours, theirs, strict=True):
        wrong = [name for name in _OF_THE_BATCH if mine.get(name) != other.get(name)]
        if wrong:
            raise ChaosError(f"{found.path}: step {mine['step']} has another {', '.join(wrong)} than {wanted.path}")
        for name in ("loss", "eval_loss"):
            if name in other:
                largest = max(largest, abs(mine[name] - other[name]) / max(abs(other[name]), 1e-12))
    return largest


def require_comparable(reference: RunFolder, settings: dict[str, Any], ranks: int) -> None:
    """Raise ConfigError unless the reference is a finished run of these settings on so many ranks."""
    if not reference.summary.exists():
        raise ConfigError(f"{reference.path} is no finished run; give one, or leave --reference out")
    theirs = dict(_dotted(json.loads(reference.config.read_text(encoding="utf-8"))))
    for key, value in settings.items():
        if not key.startswith(_MAY_DIFFER) and key in theirs and theirs[key] != value:
            raise ConfigError(f"{reference.path} was run with {key} = {theirs[key]!r}, and this is {value!r}")
    size = json.loads(reference.facts.read_text(encoding="utf-8"))["world_size"]
    if size != ranks:
        raise ConfigError(f"{reference.path} was run on {size} ranks, and these are {ranks}")


def median_seconds(folder: RunFolder) -> float:
    """Return how long a step takes, half of them longer."""
    seconds = sorted(line["seconds"] for line in read_metrics(folder.metrics) if "loss" in line)
    return seconds[len(seconds) // 2] if seconds else 0.0


def disk_use(path: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _times(line: dict[str, Any]) -> Iterator[str]:
    return (key for key in line if key in OF_THE_MACHINE or key.startswith("seconds."))


def _dotted(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        yield from ((key if name is None else f"{key}.{name}", entry) for name, entry in inner)
