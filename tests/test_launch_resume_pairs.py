"""A job that one schedule saved, resumed under any other: the same losses, norms, weights and moments."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch.distributed as dist

from pipeline.config import ScheduleName
from tests.job_cases import SHORT, assert_near, assert_told, rank_trains, saved
from tests.spawn import run_ranks

SCHEDULES = ("ddp", *get_args(ScheduleName))
OPTIONS = {"lengths": SHORT, "layers": 4}
LORA = {"lora.rank": 2}


def flags_of(schedule):
    return {} if schedule == "ddp" else {"pipeline.ranks": 2, "pipeline.schedule": schedule}


def rank_saves(info, folder, more):
    """Two steps under every schedule, and two more in the same folder: what is saved after both."""
    for name in SCHEDULES:
        rank_trains(info, f"{folder}/{name}", 4, {**flags_of(name), **more}, OPTIONS)


def rank_resumes(info, folder, first, more):
    """Resume what `first` saved after two steps under every schedule; losses, norms and held-out losses of each."""
    told = {}
    for name in SCHEDULES:
        place = Path(folder) / f"{first}-{name}"
        if info.rank == 0:
            shutil.copytree(Path(folder) / first, place, symlinks=True)
            for step in (3, 4):
                shutil.rmtree(place / f"step-{step}")
        dist.barrier()
        told[name] = rank_trains(info, str(place), 4, {**flags_of(name), **more}, OPTIONS)
    return told


@pytest.mark.slow
@pytest.mark.timeout(390)
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_what_any_schedule_saves_any_other_resumes(tmp_path, more):
    """To the order of additions, fp64; under the same schedule to the bit."""
    (expected,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), 4, more, OPTIONS)
    run_ranks(rank_saves, 2, str(tmp_path), more, timeout_s=300)
    for first in SCHEDULES:
        found, other = run_ranks(rank_resumes, 2, str(tmp_path), first, more, timeout_s=300)
        assert found == other
        for name in SCHEDULES:
            assert_told(found[name], expected[2:], 1e-9)
            ours = saved(tmp_path / f"{first}-{name}", 4)
            assert_near(ours, saved(tmp_path / "one", 4), 1e-7)
            if name == first:
                assert_near(ours, saved(tmp_path / name, 4), 0.0)
