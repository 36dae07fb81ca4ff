"""Every system call of a save fails in turn: a clear error or a good checkpoint, and training goes on either way."""

import errno
import os
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.errors import SaveError
from checkpointing.storage.local import LocalStorage
from tests.faults import SHORT, Faults, Shortage
from tests.flat_states import Flat, same
from tests.launch_jobs import snapshot

BASE = torch.arange(20_000.0)


class Job:
    """A model that is trained between saves, as the fence sees it; its weights are a function of the step."""

    def __init__(self, step: int) -> None:
        self.weight = torch.nn.Parameter(torch.full((30_000,), float(step)))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.step = step

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "base": BASE, "step": self.step}

    def train(self) -> None:
        self.weight.grad = torch.full_like(self.weight, -1.0)
        self.optimizer.step()
        self.step += 1


def expected(step: int) -> dict[str, Any]:
    return {"weight": torch.full((30_000,), float(step)), "base": BASE, "step": step}


def restored(path: Path) -> int | None:
    with Checkpointer(path, group=SINGLE) as ckpt:
        back = Flat({})
        info = ckpt.restore({"run": back})
        if info is None:
            return None
        assert same(back.loaded, expected(info.step))
        for step in ckpt.steps():
            ckpt.restore({"run": back}, step=step)
            assert same(back.loaded, expected(step)), f"step {step} is a mix"
        return info.step


def train_and_save(path: Path, settings: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Go on from step 2 and save after steps 3 and 4; return the steps told durable, and the errors."""
    job, told, errors = Job(2), [2], []
    try:
        ckpt = Checkpointer(path, group=SINGLE, keep=KeepLast(2), timeout_s=10, **settings)
    except Exception as error:  # noqa: BLE001 - to be looked at
        return told, [f"{type(error).__name__}: {error}"]
    try:
        ckpt.adopt(2)
    except CheckpointError as error:  # it saves all the same, as a run of its own
        errors.append(str(error))
    for _ in range(2):
        job.train()
        try:
            handle = ckpt.save(job.step, {"run": Flat(job.state())})
            job.train()  # behind the fence, which never raises: the save has what was there before
            job.weight.data -= 1
            job.step -= 1
            told.append(int(handle.wait().name.removeprefix("step-")))
        except CheckpointError as error:
            errors.append(str(error))
        assert ckpt._engine.idle(20)
    try:
        ckpt.close()
    except CheckpointError as error:
        errors.append(str(error))
    assert torch.equal(job.weight.detach(), torch.full((30_000,), float(job.step)))
    return told, errors


def template(path: Path) -> Path:
    """Two checkpoints, to start every case from."""
    with Checkpointer(path, group=SINGLE, keep=KeepLast(2)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"run": Flat(expected(step))}).wait()
    return path


def sweep(
    folder: Path, make: Any, settings: dict[str, Any], text: str, *, benign: bool = False, every: int = 1
) -> dict[str, int]:
    """Let the N-th call fail, for `every` N or every so many; count the cases by what came of them."""
    counts = {"cases": 0, "aborted": 0, "succeeded": 0}
    begun, total, at = template(folder / "template"), 10**9, 0
    while at < total:
        path = Path(shutil.copytree(begun, folder / f"{at}"))
        start = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            fault = make(patch, path, at if total < 10**9 else 10**9)
            told, errors = train_and_save(path, settings)
        if total == 10**9:  # the first time nothing fails: how many are there?
            assert (told, errors) == ([2, 3, 4], [])
            total = len(fault.calls)
            shutil.rmtree(path)
            continue
        what = f"call {at}, {fault.calls[at : at + 1]}: told {told}, errors {errors}"
        assert time.monotonic() - start < 30, what
        assert all(text in error for error in errors), what
        newest = restored(path)
        assert newest is not None, what
        assert newest >= max(told), what
        assert not (benign and errors), what
        with Checkpointer(path, group=SINGLE) as ckpt:  # and the run goes on
            ckpt.save(9, {"run": Flat(expected(9))}).wait()
        assert restored(path) == 9
        assert no_threads(), what
        shutil.rmtree(path)
        counts["cases"] += 1
        counts["aborted" if errors else "succeeded"] += 1
        at += every
    return counts


def no_threads() -> bool:
    """Whether the threads of closed checkpointers end."""
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        if not [one for one in threading.enumerate() if one.name.startswith("checkpoint")]:
            return True
        time.sleep(0.001)
    return False


SLOW = pytest.mark.slow
SWEEPS = [
    pytest.param(errno.EIO, True, {}),
    pytest.param(errno.ENOSPC, False, {"incremental": True}),
    pytest.param(errno.ENOMEM, True, {"busy": "skip"}),
    pytest.param(errno.EMFILE, False, {}),
    pytest.param(SHORT, False, {}),
    *(pytest.param(fault, once, settings, marks=SLOW)
      for fault in (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EMFILE, SHORT)
      for once in (True, False)
      for settings in ({}, {"incremental": True}, {"busy": "skip"})),
]  # fmt: skip


@pytest.fixture
def folder():
    """In memory where that is possible: what is durable is not at stake here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        yield Path(place)


@pytest.mark.parametrize(("fault", "once", "settings"), SWEEPS)
def test_the_nth_system_call_fails(folder, record_property, fault, once, settings):
    def make(patch, path, at):
        return Faults(patch, path, at, fault, once=once)

    text = "" if fault == SHORT else os.strerror(fault)
    counts = sweep(folder, make, settings, text, benign=fault == SHORT)
    assert fault == SHORT or counts["aborted"] > 5
    record_property("nth_call", counts)


def test_the_nth_system_call_of_a_restore_fails(folder, record_property):
    """The right step, an older one, or a clear error; and nothing is set aside for an error that may be over."""
    begun, counts, at = template(folder / "run"), {"restores": 0, "fell_back": 0, "refused": 0}, 0
    before = snapshot(begun)
    while True:
        with pytest.MonkeyPatch.context() as patch:
            fault = Faults(patch, begun, at, errno.EIO, once=True)
            back, told = Flat({}), os.strerror(errno.EIO)
            with Checkpointer(begun, group=SINGLE) as ckpt:
                try:
                    info = ckpt.restore({"run": back})
                    assert same(back.loaded, expected(info.step))
                    counts["fell_back"] += info.step == 1
                except CheckpointError as error:
                    told = str(error)
                    counts["refused"] += 1
        if at >= len(fault.calls):
            break
        assert os.strerror(errno.EIO) in told, fault.calls[at]
        counts["restores"] += 1
        at += 1
        assert snapshot(begun) == before, fault.calls[at - 1]
    assert counts["restores"] > 10
    record_property("nth_call", counts)


@pytest.mark.parametrize("once", [True, False])
def test_memory_or_threads_run_out(folder, record_property, once):
    counts = sweep(folder, lambda patch, path, at: Shortage(patch, at, once=once), {}, "")
    assert counts["aborted"] > 2
    record_property("nth_call", counts)


def test_a_process_without_a_descriptor_left(folder):
    """The limit itself, and not an error in its place."""
    job, usual = Job(2), resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpointer(template(folder / "run"), group=SINGLE, keep=KeepLast(2)) as ckpt:
        ckpt.restore({"run": Flat({})})
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
        try:
            job.train()
            handle = ckpt.save(3, {"run": Flat(job.state())})
            job.train()
            with pytest.raises(SaveError, match=f"save of step 3 failed: .*{os.strerror(errno.EMFILE)}"):
                handle.wait(20)
            with pytest.raises(CheckpointError, match=os.strerror(errno.EMFILE)):
                ckpt.restore({"run": Flat({})})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        ckpt.save(4, {"run": Flat(job.state())}).wait()
    assert restored(folder / "run") == 4


def test_a_disk_that_stops_is_told_and_recovered_from(tmp_path, monkeypatch):
    """An fsync that does not return: `wait`, the next `save` and the fence all end, and say so; later all is well."""
    template(tmp_path / "run")
    sync, stopped, goes_on = LocalStorage.sync, threading.Event(), threading.Event()

    def stops(self, fd):
        stopped.set()
        assert goes_on.wait(60)
        sync(self, fd)

    job = Job(2)
    with Checkpointer(tmp_path / "run", group=SINGLE, timeout_s=1.0) as ckpt, monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "sync", stops)
        job.train()
        handle = ckpt.save(3, {"run": Flat(job.state())})
        assert stopped.wait(20)
        job.train()
        with pytest.raises(SaveError, match=r"save of step 3 is not durable: no sign of life for .* s"):
            handle.wait()
        second = ckpt.save(4, {"run": Flat(job.state() | {"words": [1]})})
        job.train()
        goes_on.set()
        assert handle.wait() == tmp_path / "run" / "step-3"
        with pytest.raises(SaveError, match=r"save of step 4 failed: .*(no sign of life|not staged)"):
            second.wait()
        ckpt.save(5, {"run": Flat(job.state())}).wait()
    assert restored(tmp_path / "run") == 5
