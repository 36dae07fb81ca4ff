"""Incremental saves of tensors that change in part: crashes at any point, and every system call that fails in turn."""

import errno
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

from checkpointing.errors import IntegrityError, SaveError
from checkpointing.folder import Folder
from checkpointing.storage.local import LocalStorage
from checkpointing.tiers import copy_step
from tests import test_checkpointing_crash_states as crash
from tests import test_checkpointing_faults as nth
from tests.crash_disk import Disk
from tests.faults import Faults
from tests.flat_states import Flat, same
from tests.test_checkpointing_corruption import first_damage, write_through
from tests.test_checkpointing_rows import links, opened, restored, save


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


def test_nothing_refers_to_a_file_in_which_a_copy_found_damage(tmp_path):
    frozen, moving = torch.randn(300, 512), torch.randn(300, 512)
    folder = Folder(tmp_path / "run", LocalStorage())
    ckpt = opened(folder.root, mirror=tmp_path / "safe")
    for step in range(1, 6):
        moving += 1
        save(ckpt, step, {"frozen": frozen, "moving": moving})
        while ckpt._committer.mirror and ckpt._committer.mirror.pending():
            time.sleep(0.01)
        if step == 2:
            path = folder.at(2) / "rank-00000.from-1.safetensors"
            data = bytearray(path.read_bytes())
            data[5000] ^= 1
            write_through(path, bytes(data))
    with pytest.raises(SaveError, match=r"lacks a checkpoint: step-3/rank-00000\.from-1"):
        ckpt.close()
    assert not links(folder.root, 4)
    assert links(folder.root, 5) == {"rank-00000.from-4.safetensors"}
    assert [first_damage(folder, step) for step in (4, 5)] == [None, None]
    assert Folder(tmp_path / "safe", LocalStorage()).candidates() == [1, 2, 4, 5]


def test_nothing_refers_to_a_file_that_a_restore_could_not_read(tmp_path, monkeypatch):
    state = {"frozen": torch.randn(300, 512)}
    length = LocalStorage.length

    def fails(self, path):
        if path.parent.name == "step-3" and ".from-" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return length(self, path)

    with opened(tmp_path) as ckpt:
        save(ckpt, 1, state)
        save(ckpt, 2, state | {"other": torch.randn(300, 512)})
        save(ckpt, 3, state)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "length", fails)
            info = ckpt.restore(Flat({}))
            assert info is not None
            assert info.step == 2
        save(ckpt, 4, state)
    assert links(tmp_path, 3)
    assert not links(tmp_path, 4)


def test_a_checkpoint_that_is_replaced_while_it_is_copied_is_no_copy(tmp_path, monkeypatch):
    first, stream = Folder(tmp_path / "run", LocalStorage()), LocalStorage.write_stream
    with opened(first.root) as ckpt:
        save(ckpt, 1, {"w": torch.zeros(30_000)})
        save(ckpt, 2, {"w": torch.ones(30_000)})

        def goes_back(self, path, length, parts):
            stream(self, path, length, parts)
            ckpt.restore(Flat({}), step=1)
            save(ckpt, 2, {"w": torch.full((30_000,), 2.0)})

        monkeypatch.setattr(LocalStorage, "write_stream", goes_back)
        with pytest.raises(IntegrityError, match="was replaced by another"):
            copy_step(first, Folder(tmp_path / "safe", LocalStorage()), 2)
    assert list((tmp_path / "safe").iterdir()) == []


def test_names_with_line_breaks_are_not_taken_for_two(tmp_path):
    one, two, both = torch.randn(40_000), torch.randn(40_000), torch.randn(80_000)
    with opened(tmp_path) as ckpt:
        for step in range(1, 5):
            if step % 2:
                both = both + 1
            else:
                one, two = one + 1, two + 1
            state = {"one": one, "two": two, "one\ntwo": both}
            save(ckpt, step, state)
            assert same(restored(tmp_path, step), state), step
