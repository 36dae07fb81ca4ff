"""Where and how people run it: odd paths, a default device, a forked child, values of any size."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast, ObjectProvider
from checkpointing.errors import StateError
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, assorted, same
from tests.spawn import ROOT

BIG = 60_000


@pytest.mark.parametrize("name", ["with spaces ", "läufe/ß√", "step-7", "-n", "a'b\"c", "new\nline", "r" * 200])
def test_any_path_will_do(tmp_path, name):
    place = tmp_path / name / "run"
    with Checkpointer(place, group=SINGLE, keep=KeepLast(1), mirror=tmp_path / "second" / name) as ckpt:
        for step in (1, 2):
            ckpt.save(step, Flat(assorted(step))).wait()
    with Checkpointer(str(place), group=SINGLE) as ckpt:
        assert ckpt.restore(back := Flat({})).step == 2
    assert same(back.loaded, assorted(2))
    command = [sys.executable, "-m", "checkpointing", "verify", str(place)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Step 1 goes after a later save, where it was still being copied to the second tier.
    assert done.stdout.endswith("step 2: every byte is what was saved\n")


def test_a_folder_behind_a_link_and_one_behind_a_broken_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with Checkpointer(tmp_path / "run", group=SINGLE, keep=KeepLast(1)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, Flat({"a": step})).wait()
        ckpt.restore(back := Flat({}))
    assert back.loaded == {"a": 2}
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["latest", "step-2"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with Checkpointer(tmp_path / "nowhere", group=SINGLE) as ckpt:
        assert ckpt.restore(Flat({})) is None
        with pytest.raises(CheckpointError, match=r"FileExistsError.*nowhere"):
            ckpt.save(1, Flat({"a": 1})).wait()


def test_the_first_tier_is_a_folder_and_the_second_another(tmp_path):
    with pytest.raises(CheckpointError, match=r"s3://bucket/run is no folder; .* give s3://bucket/run as its mirror"):
        Checkpointer("s3://bucket/run", group=SINGLE)
    (tmp_path / "link").symlink_to(tmp_path)
    for same_one in (tmp_path / "run", tmp_path / "link" / "run"):
        with pytest.raises(CheckpointError, match="is the folder of the run itself; give another one"):
            Checkpointer(tmp_path / "run", group=SINGLE, mirror=same_one)


def test_a_default_device_is_not_where_the_engine_keeps_its_bytes(tmp_path):
    """As of `torch.set_default_device`; the meta device stands for an accelerator."""
    state = {"small": torch.arange(5.0), "large": torch.arange(float(BIG)), "turned": torch.randn(300, 300).t()}
    with torch.device("meta"):
        with Checkpointer(tmp_path, group=SINGLE) as ckpt:
            ckpt.save(1, {"run": Flat(state)}).wait()
        with Checkpointer(tmp_path, group=SINGLE) as ckpt:
            ckpt.restore({"run": (back := Flat({}))})
    assert all(tensor.device.type == "cpu" for tensor in back.loaded.values())
    assert same(back.loaded, state)


def test_a_forked_child_leaves_the_save_of_its_parent_alone(tmp_path, monkeypatch):
    """It has neither the threads nor the store: it neither waits at its steps nor on its way out, and cannot save."""
    sync, goes_on = LocalStorage.sync, tmp_path / "goes-on"

    def waits(self, fd):
        while not goes_on.exists():
            time.sleep(0.005)
        sync(self, fd)

    monkeypatch.setattr(LocalStorage, "sync", waits)
    weight = torch.nn.Parameter(torch.ones(BIG))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        handle = ckpt.save(1, Flat({"w": weight.detach(), "n": 1}))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                optimizer.step()
                with pytest.raises(CheckpointError, match="forked"):
                    ckpt.save(2, Flat({"n": 2}))
                with pytest.raises(CheckpointError, match="forked"):
                    handle.wait()
                ckpt.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not handle.is_over
        goes_on.touch()
        assert handle.wait(30).name == "step-1"


AT_EXIT = """
import os, sys, time, torch
from checkpointing import SINGLE, Checkpointer
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat
sync = LocalStorage.sync
LocalStorage.sync = lambda self, fd: (time.sleep(1.0), sync(self, fd))
ckpt = Checkpointer(sys.argv[1], group=SINGLE)
ckpt.save(1, Flat({"a": torch.ones(60_000)}))
if sys.argv[2] == "fork" and not os.fork():
    sys.exit(0)  # an ordinary end of a child, with all that Python does then
if sys.argv[2] == "term":
    print("saving", flush=True)
    time.sleep(60)
"""


def test_the_end_of_a_process_finishes_the_save_and_the_end_of_its_child_does_not(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "run"), "fork"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        assert ckpt.steps() == [1]
        assert ckpt.restore(Flat({})).step == 1


def test_a_process_that_is_terminated_leaves_nothing_that_is_in_the_way(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path), "term"]
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "saving\n"
    job.terminate()
    assert job.wait(30) == -signal.SIGTERM
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        assert ckpt.restore(Flat({})) in (None,)
        ckpt.save(1, Flat({"a": 1})).wait()
        assert ckpt.steps() == [1]


def test_a_manifest_that_no_reader_would_take_is_not_committed(tmp_path, monkeypatch):
    text = "x" * 100_000
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(1, Flat({"text": text})).wait()
        ckpt.restore(back := Flat({}))
        assert back.loaded == {"text": text}
        monkeypatch.setattr("checkpointing.commit.SMALL_BYTES", 50_000)
        with pytest.raises(StateError, match=r"the manifest would have \d+ bytes, and readers take 50000: save"):
            ckpt.save(2, Flat({"text": text})).wait()
        assert ckpt.steps() == [1]
        ckpt.save(3, Flat({"text": ObjectProvider(text)})).wait()
        ckpt.restore(back)
    assert back.loaded == {"text": text}


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    """Newest is the highest step, and every wait is measured by a clock that nobody sets."""
    real = time.time
    with Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(2), timeout_s=30) as ckpt:
        for step in (1, 2, 3):
            monkeypatch.setattr(time, "time", lambda step=step: real() - 10**8 * step)
            place: Path = ckpt.save(step, Flat({"a": step})).wait()
            os.utime(place, (10**9 - 10**6 * step,) * 2)
            os.utime(place / "manifest.json", (10**9 - 10**6 * step,) * 2)
        assert ckpt._engine.idle(20)
        assert ckpt.steps() == [2, 3]
        assert ckpt.restore(Flat({})).step == 3


@pytest.mark.parametrize("mirror", ["s3://", "s3:/bucket/run", "ftp://host/run", "gs:///"])
def test_a_mirror_that_is_no_place_is_refused_at_once(tmp_path, mirror):
    with pytest.raises(CheckpointError, match="is neither a folder nor s3://bucket/prefix"):
        Checkpointer(tmp_path / "run", group=SINGLE, mirror=mirror)


def test_a_close_that_is_interrupted_can_be_made_again(tmp_path, monkeypatch, caplog):
    sync, goes_on = LocalStorage.sync, threading.Event()
    monkeypatch.setattr(LocalStorage, "sync", lambda self, fd: (goes_on.wait(30), sync(self, fd)))
    ckpt = Checkpointer(tmp_path, group=SINGLE)
    handle = ckpt.save(1, Flat({"a": torch.ones(BIG)}))
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        ckpt.close()
    with pytest.raises(CheckpointError, match="closed"):
        ckpt.save(2, Flat({"a": 1}))
    assert not handle.is_over
    goes_on.set()
    with caplog.at_level("INFO", logger="checkpointing"):
        ckpt.close()
    assert ckpt.steps() == [1]
    assert "finished on the way out" in caplog.text
    ckpt.close()


def test_a_folder_inside_of_a_checkpoint_keeps_nothing_else_on_the_disk(tmp_path, caplog):
    with Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(1)) as ckpt:
        for step in range(4):
            place: Path = ckpt.save(step, Flat({"a": torch.ones(BIG)})).wait()
            assert ckpt._engine.idle(20)
            (place / "0-results").mkdir()
            (place / "0-results" / "scores.txt").write_text("kept")
    assert "cannot be removed" in caplog.text
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["step-3"]
    assert len([*tmp_path.rglob("scores.txt")]) == 4


@pytest.mark.parametrize("settings", [{"timeout_s": float("inf")}, {"timeout_s": 1e10}, {"staging_bytes": 2e9}])
def test_settings_no_wait_or_buffer_could_have_are_refused(tmp_path, settings):
    with pytest.raises(CheckpointError, match=f"{next(iter(settings))} is .*; it must be"):
        Checkpointer(tmp_path, group=SINGLE, **settings)
