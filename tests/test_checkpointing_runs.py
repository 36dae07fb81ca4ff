"""Whose run a save belongs to: a process that has not restored a run neither prunes it nor hides behind it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.adapters.dcp import DcpReader, DcpWriter
from checkpointing.errors import StateError
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat
from tests.launch_jobs import snapshot

ANOTHER = r"step-20 is of another run \([0-9a-f]{8}\), and a restart would go on from it instead of step"


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder with steps 10 and 20 of one run."""
    save(tmp_path / "run", 10, 20)
    return tmp_path / "run"


def save(path: Path, *steps: int, **settings: Any) -> None:
    with Checkpointer(path, group=SINGLE, **settings) as ckpt:
        for step in steps:
            ckpt.save(step, Flat({"a": step})).wait()


def runs(path: Path) -> dict[int, str]:
    """The run of every checkpoint there is."""
    found = sorted(path.glob("step-*"), key=lambda one: int(one.name.removeprefix("step-")))
    return {int(one.name[5:]): json.loads((one / "manifest.json").read_text())["run_id"] for one in found}


def test_what_was_not_restored_is_not_pruned_and_that_is_said(two, caplog):
    save(two, 30, 40, keep=KeepLast(1))
    found = runs(two)
    assert list(found) == [10, 20, 40]
    assert found[10] == found[20] != found[40]
    assert caplog.text.count("step-20 is of a run") == 1
    with Checkpointer(two, group=SINGLE, keep=KeepLast(1)) as ckpt:
        assert ckpt.restore(Flat({})).step == 40
        ckpt.save(50, Flat({"a": 50})).wait()
    assert list(runs(two)) == [10, 20, 50]


@pytest.mark.parametrize("step", [0, 15])
def test_a_save_that_no_restart_would_find_is_refused(two, step):
    before = snapshot(two)
    with Checkpointer(two, group=SINGLE, keep=KeepLast(1)) as ckpt:
        for _ in range(2):  # not the first time only
            with pytest.raises(StateError, match=f"{ANOTHER} {step}; restore it first, or save into another folder"):
                ckpt.save(step, Flat({"a": step})).wait()
        assert snapshot(two) == before
        ckpt.restore(Flat({}))
        ckpt.save(21, Flat({"a": 21})).wait()
    assert list(runs(two)) == [21]


def test_a_restore_that_failed_is_none(two):
    class Strict(Flat):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("another model")

    before = snapshot(two)
    with Checkpointer(two, group=SINGLE, keep=KeepLast(1)) as ckpt:
        with pytest.raises(CheckpointError, match="another model"):
            ckpt.restore(Strict({}), step=10)
        with pytest.raises(StateError, match=f"{ANOTHER} 15"):
            ckpt.save(15, Flat({"a": 15})).wait()
        assert snapshot(two) == before
        ckpt.save(30, Flat({"a": 30})).wait()
    assert list(runs(two)) == [10, 20, 30]


def test_going_back_in_one_run_does_not_hide_another(two):
    """Only the newer checkpoints of its own run are abandoned."""
    save(two, 40)
    with Checkpointer(two, group=SINGLE) as ckpt:
        ckpt.restore(Flat({}), step=10)
        with pytest.raises(StateError, match="step-40 is of another run"):
            ckpt.save(15, Flat({"a": 15})).wait()
    assert list(runs(two)) == [10, 20, 40]


def test_two_jobs_in_one_folder_do_not_touch_what_the_other_saved(tmp_path):
    with (
        Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(1)) as left,
        Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(1)) as right,
    ):
        assert left.restore(Flat({})) is None
        assert right.restore(Flat({})) is None
        left.save(1, Flat({"a": "left"})).wait()
        with pytest.raises(StateError, match="step-1 exists already"):
            right.save(1, Flat({"a": "right"})).wait()
        right.save(2, Flat({"a": "right"})).wait()
        with pytest.raises(StateError, match="step-2 exists already"):
            left.save(2, Flat({"a": "left"})).wait()
        right.save(4, Flat({"a": "right"})).wait()
        with pytest.raises(StateError, match="step-4 is of another run"):
            left.save(3, Flat({"a": "left"})).wait()
    found = runs(tmp_path)
    assert list(found) == [1, 4]
    assert found[1] != found[4]


def test_two_processes_of_one_run_do_not_replace_each_others_checkpoint(two, monkeypatch):
    """Both were told that step 30 is free; the second one to commit it fails."""
    truncate, quicker = LocalStorage.truncate, iter([True])

    def between(self, fd, length):
        if next(quicker, False):
            with Checkpointer(two, group=SINGLE) as other:
                other.adopt(20)
                other.save(30, Flat({"a": "other"})).wait()
        truncate(self, fd, length)

    monkeypatch.setattr(LocalStorage, "truncate", between)
    with Checkpointer(two, group=SINGLE) as ckpt:
        ckpt.restore(Flat({}))
        with pytest.raises(StateError, match="step-30 exists already"):
            ckpt.save(30, Flat({"a": 30})).wait()
        assert sorted(path.name for path in two.iterdir()) == ["latest", "step-10", "step-20", "step-30"]
        ckpt.restore(back := Flat({}))
    assert back.loaded == {"a": "other"}


def test_to_look_at_an_old_checkpoint_and_go_on_from_the_newest(two):
    with Checkpointer(two, group=SINGLE) as ckpt:
        ckpt.restore(Flat({}), step=10)
        ckpt.restore(Flat({}))
        ckpt.save(30, Flat({"a": 30})).wait()
    assert list(runs(two)) == [10, 20, 30]


def test_what_was_loaded_by_other_means_can_be_adopted(two):
    with Checkpointer(two, group=SINGLE, keep=KeepLast(2)) as ckpt:
        with pytest.raises(CheckpointError, match="there is no step 30"):
            ckpt.adopt(30)
        with pytest.raises(CheckpointError, match="it must be an int"):
            ckpt.adopt("20")  # pyright: ignore[reportArgumentType]
        ckpt.adopt(20)
        ckpt.save(30, Flat({"a": 30})).wait()
    assert list(runs(two)) == [20, 30]
    with pytest.raises(CheckpointError, match="this checkpointer is closed"):
        ckpt.adopt(20)


def test_a_second_tier_holds_another_run(two, tmp_path):
    """The first tier is empty, as of a new machine: a restart would take the second one's."""
    with Checkpointer(tmp_path / "new", group=SINGLE, mirror=two) as ckpt:
        for _ in range(2):
            with pytest.raises(StateError, match=f"{ANOTHER} 15"):
                ckpt.save(15, Flat({"a": 15})).wait()
        assert ckpt.restore(Flat({})).step == 20
        ckpt.save(25, Flat({"a": 25})).wait()
    assert list(runs(two)) == [10, 20, 25]
    assert len(set(runs(two).values())) == 1


def test_what_dcp_loads_is_the_run_that_goes_on(tmp_path):
    def job(steps: list[int], load: bool) -> None:
        state = {"w": torch.zeros(1000)}
        writer = DcpWriter(tmp_path, keep=KeepLast(2), group=SINGLE)
        if load:
            dcp.load(state, storage_reader=DcpReader(tmp_path, writer.checkpointer), no_dist=True)
            assert state["w"][0] == steps[0] - 1
        for step in steps:
            state["w"].fill_(step)
            dcp.save(state, checkpoint_id=tmp_path / f"step-{step}", storage_writer=writer, no_dist=True)
        writer.close()

    job([1, 2], load=False)
    job([3], load=True)
    assert list(runs(tmp_path)) == [2, 3]
    job([4], load=False)
    assert list(runs(tmp_path)) == [2, 3, 4]
