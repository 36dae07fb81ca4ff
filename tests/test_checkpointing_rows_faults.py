"""Incremental saves of tensors that change in part: crashes at any point, and every system call that fails in turn."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests import test_checkpointing_crash_states as crash
from tests import test_checkpointing_faults as nth
from tests.crash_disk import Disk
from tests.faults import Faults


def table(step, columns):
    """Rows in one of five places are those of a step."""
    made = torch.arange(1100.0 * columns).reshape(1100, columns)
    for past in range(step % 20 + 1):
        made[past % 5 * 200 : past % 5 * 200 + 3] = past
    return made


def files_of_table(place):
    entries = json.loads((place / "manifest.json").read_text())["tensors"]
    return {entry["file"] for entry in entries if entry["name"] == "run.table"}


def state(step, rank=0):
    small = {"w": torch.full((700,), float(step)), f"rng.{rank}": torch.full((5,), step), "step": step}
    return small | {"table": table(step, 320)}


def test_crashes_while_rows_are_referred_to(tmp_path, monkeypatch):
    monkeypatch.setattr(crash, "state", state)
    origin = crash.begun(tmp_path / "origin", 10, 20)
    disk = Disk(origin)
    record = crash.saves(origin, 30, 31, 32, 33, incremental=True)
    assert len(files_of_table(origin / "run" / "step-33")) > 1
    counts = crash.check(record, disk, lambda root: crash.restored(root / "run"), first=20, every=29)
    assert counts["different"] > 150


class Job(nth.Job):
    def state(self):
        return super().state() | {"table": table(self.step, 1024).roll(250, 0)}


@pytest.mark.parametrize(
    ("fault", "once", "every"),
    [
        (errno.ENOSPC, False, 6),
        pytest.param(errno.ENOSPC, False, 1, marks=pytest.mark.slow),
        pytest.param(errno.EIO, True, 1, marks=pytest.mark.slow),
    ],
)
def test_the_nth_system_call_fails_while_rows_are_referred_to(monkeypatch, fault, once, every):
    before, settings = nth.expected, {"incremental": True}
    monkeypatch.setattr(nth, "expected", lambda step: before(step) | {"table": table(step, 1024).roll(250, 0)})
    monkeypatch.setattr(nth, "Job", Job)

    def make(patch, path, at):
        return Faults(patch, path, at, fault, once=once)

    with tempfile.TemporaryDirectory(dir=crash.shm()) as place:
        nth.train_and_save(nth.template(Path(place) / "one"), settings)
        assert len(files_of_table(Path(place) / "one" / "step-4")) > 1
        counts = nth.sweep(Path(place), make, settings, os.strerror(fault), every=every)
    assert counts["aborted"] > 5
