"""A save that ends anywhere, by an error or by death, leaves whole checkpoints only; the next save succeeds."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, same

CHANGES = ["make_folders", "make_folder", "create", "create_direct", "write", "write_at", "truncate", "sync", "close"]
CHANGES += ["sync_folder", "rename", "link", "remove_file", "remove_tree"]


def state(step: int) -> dict:
    return {"w": torch.full((3000,), float(step)), "b": torch.full((5,), step, dtype=torch.int32), "step": step}


class Fault:
    """Counts the calls that change the disk; from call `at` on they fail."""

    def __init__(self, monkeypatch, at: int, error: Callable[[], BaseException]) -> None:
        self.calls: list[str] = []
        self.at, self.error, self.armed = at, error, True
        for name in CHANGES:
            monkeypatch.setattr(LocalStorage, name, self.wrap(name, getattr(LocalStorage, name)))

    def wrap(self, name, method):
        def call(*args):
            if self.armed:
                self.calls.append(name)
                if len(self.calls) - 1 >= self.at:
                    if name in ("write", "write_at"):  # half of it got through
                        method(args[0], args[1], args[2][: len(args[2]) // 8192 * 4096], *args[3:])
                    if name == "remove_tree":
                        for entry in list(os.scandir(args[1]))[:1]:
                            os.unlink(entry.path)
                    if name == "close":
                        method(*args)  # as the end of a process does, and a close that fails
                    raise self.error()
            return method(*args)

        return call


def prepare(path):
    """Two checkpoints and a leftover, so that a save has everything to do: set `latest`, prune and clear."""
    with Checkpointer(path, group=SINGLE, keep=KeepLast(2)) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"run": Flat(state(step))}).wait()
    run = next(path.glob("step-20/manifest.json")).read_text().split('"run_id":"')[1][:8]
    (path / f"step-15.tmp-{run}-00000000").mkdir()
    (path / f"step-15.tmp-{run}-00000000" / "rank-00000.safetensors").write_text("partial")
    (path / f"latest.tmp-{run}-00000000").write_text("partial")


def fresh(path):
    """What a new process sees: the step restored, after checking that it holds its own numbers."""
    with Checkpointer(path, group=SINGLE) as ckpt:
        back = Flat({})
        info = ckpt.restore({"run": back})
        assert info is not None
        assert same(back.loaded, state(info.step))
        for step in ckpt.steps():  # nothing partial is visible
            ckpt.restore({"run": back}, step=step)
            assert same(back.loaded, state(step))
        return info


def save(path, step, **settings):
    with Checkpointer(path, group=SINGLE, keep=KeepLast(2), **settings) as ckpt:
        if (newest := ckpt.latest()) is not None:
            ckpt.adopt(newest)
        return ckpt.save(step, {"run": Flat(state(step))}).wait()


def count_calls(tmp_path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        prepare(tmp_path / "count")
        fault = Fault(patch, 10**9, OSError)
        save(tmp_path / "count", 30)
        return fault.calls


def test_a_save_makes_the_calls_in_the_order_of_the_contract(tmp_path):
    calls = count_calls(tmp_path)
    durable = calls.index("rename")
    data = ["create_direct", "write_at", "write_at", "truncate", "sync", "close"]
    manifest = ["create", "write", "sync", "close"]
    assert calls[:durable] == ["make_folders", "make_folder", *data, *manifest, "sync_folder"]
    assert calls[durable : durable + 2] == ["rename", "sync_folder"]
    assert calls.index("remove_tree") > durable + 2
    assert sorted(p.name for p in (tmp_path / "count").iterdir()) == ["latest", "step-20", "step-30"]


def test_an_error_at_every_call_from_then_on(tmp_path, caplog):
    """What fails before the commit fails the save; what fails behind it is told."""
    code = errno.ENOSPC
    calls = count_calls(tmp_path)
    committed = calls.index("rename") + 1
    for at in range(len(calls)):
        path = tmp_path / f"{at}"
        prepare(path)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, at, lambda: OSError(code, os.strerror(code)))
            ckpt = Checkpointer(path, group=SINGLE, keep=KeepLast(2))
            ckpt.adopt(20)
            caplog.clear()
            handle = ckpt.save(30, {"run": Flat(state(30))})
            assert ckpt._engine.idle(20)
            fault.armed = False
            if at <= committed:
                with pytest.raises(CheckpointError, match=f"save of step 30 failed: .*{os.strerror(code)}"):
                    handle.wait()
            else:
                handle.wait()  # durable: what fails in clearing up is told, and fails nothing
                assert not caplog.records or os.strerror(code) in caplog.text
            if at < committed:
                assert fresh(path).step == 20
                ckpt.save(30, {"run": Flat(state(30))}).wait()
            ckpt.close()
        assert fresh(path).step == 30


def test_a_failed_save_leaves_no_bytes_behind(tmp_path, monkeypatch):
    # Else a full disk would stay full: the next save would fail for the sake of this one.
    prepare(tmp_path)
    before = set(tmp_path.rglob("*"))
    fallocate = os.posix_fallocate

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        with pytest.raises(CheckpointError, match=r"save of step 30 failed: OSError: .*No space left on device"):
            ckpt.save(30, {"run": Flat(state(30))}).wait()
        assert set(tmp_path.rglob("*")) == before
        monkeypatch.setattr(os, "posix_fallocate", fallocate)
        ckpt.save(30, {"run": Flat(state(30))}).wait()
    assert fresh(tmp_path).step == 30


def test_short_writes_and_interrupted_reads_are_continued(tmp_path, monkeypatch):
    write, pwrite, preadv = os.write, os.pwrite, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:4096] if at < 4096 else data[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:700]], at))
    save(tmp_path, 1)
    assert fresh(tmp_path).step == 1


def test_errors_nobody_waited_for_surface_at_the_next_call(tmp_path):
    prepare(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        ckpt = Checkpointer(tmp_path, group=SINGLE)
        fault = Fault(patch, 2, lambda: OSError(errno.EIO, "broken"))
        ckpt.save(30, {"run": Flat(state(30))})
        assert ckpt._engine.idle(20)
        fault.armed = False
        with pytest.raises(CheckpointError, match=r"save of step 30 failed: .*broken"):
            ckpt.save(40, {"run": Flat(state(40))})
        assert ckpt.save(40, {"run": Flat(state(40))}).wait() == tmp_path / "step-40"
        fault.armed = True
        ckpt.save(50, {"run": Flat(state(50))})
        with pytest.raises(CheckpointError, match=r"save of step 50 failed: .*broken"):
            ckpt.close()
        ckpt.close()


def test_the_error_of_a_with_block_is_not_hidden_by_an_older_one(tmp_path, caplog):
    prepare(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        Fault(patch, 2, lambda: OSError(errno.EIO, "broken"))
        with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, group=SINGLE) as ckpt:
            _ = ckpt.save(30, {"run": Flat(state(30))}), 1 / 0
    assert "save of step 30 failed: OSError: [Errno 5] broken" in caplog.text


SCRIPT = """
import sys, torch
from checkpointing import SINGLE, Checkpointer
Checkpointer(sys.argv[1], group=SINGLE).save(1, {"net": torch.nn.Linear(1, 1)})
"""


def test_an_error_nobody_waited_for_is_told_at_exit(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "save of step 1 failed: rank 0: NotADirectoryError" in done.stderr


def test_a_folder_another_process_writes_in_is_not_cleared(tmp_path):
    prepare(tmp_path)
    (busy,) = tmp_path.glob("step-15.tmp-*")
    lock = LocalStorage().lock(busy)
    assert lock is not None
    save(tmp_path, 30)
    assert busy.exists()
    LocalStorage().close(lock)
    save(tmp_path, 31)
    assert not busy.exists()


def test_leftovers_of_another_run_are_not_cleared(tmp_path):
    prepare(tmp_path)
    other = tmp_path / "step-15.tmp-ffffffff-00000000"
    other.mkdir()
    save(tmp_path, 30)
    assert other.exists()
