"""What a job is, for its report: the data, the model and the machines, as JSON values."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from chunkflow.histogram import histogram

if TYPE_CHECKING:
    from launch.job import Job


def job_facts(job: Job) -> dict[str, Any]:
    """Return what the report says of a job beyond its settings and its steps."""
    held_out = job.data.held_out
    return {
        "total_steps": job.total_steps,
        "model": job.whole.kind,
        "parameters": job.whole.num_parameters,
        "world_size": job.world.world_size,
        "device": job.world.device.type,
        "threads": torch.get_num_threads(),
        "pipeline": job.pipeline,
        "lengths": histogram(job.data.train.lengths).to_json(),
        "held_out": 0 if held_out is None else len(held_out),
        "notes": list(job.data.notes),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }
