"""Every system call of a save fails in turn: a clear error or a good checkpoint, and training goes on either way."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from tests.faults import SHORT, Faults, Shortage
from tests.flat_states import Flat, same

BASE = torch.arange(20_000.0)


class Job:
    """A model that is trained between saves, as the fence sees it; its weights are a function of the step."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(30_000))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "base": BASE, "step": self.step}

    def train(self) -> None:
        self.weight.grad = torch.full_like(self.weight, -1.0)
        self.optimizer.step()
        self.step += 1


def expected(step: int) -> dict[str, Any]:
    return {"weight": torch.full((30_000,), float(step)), "base": BASE, "step": step}


def restored(path: Path, mirror: Path | None = None) -> int | None:
    with Checkpointer(path, group=SINGLE, mirror=mirror) as ckpt:
        back = Flat({})
        info = ckpt.restore({"run": back})
        if info is None:
            return None
        assert same(back.loaded, expected(info.step))
        for step in ckpt.steps():
            ckpt.restore({"run": back}, step=step)
            assert same(back.loaded, expected(step)), f"step {step} is a mix"
        return info.step


def train_and_save(path: Path, fault: Any, settings: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Save after steps 1 to 4, the fault in the way of 3 and 4; return the steps told durable, and the errors."""
    job, told, errors = Job(), [], []
    ckpt = Checkpointer(path, group=SINGLE, keep=KeepLast(2), timeout_s=10, **settings)
    for _ in range(2):
        job.train()
        ckpt.save(job.step, {"run": Flat(job.state())}).wait()
        told.append(job.step)
    ckpt._engine.idle()
    fault = fault()
    for _ in range(2):
        job.train()
        try:
            handle = ckpt.save(job.step, {"run": Flat(job.state())})
            job.train()  # the fence: it never raises, and the save has what was there before
            job.weight.data -= 1
            job.step -= 1
            handle.wait()
            told.append(job.step)
        except CheckpointError as error:
            errors.append(str(error))
    assert ckpt._engine.idle(20)
    fault.armed = False
    try:
        ckpt.close()
    except CheckpointError as error:
        errors.append(str(error))
    assert torch.equal(job.weight.detach(), torch.full((30_000,), 4.0))
    return told, errors


def sweep(
    tmp_path: Path, make: Any, settings: dict[str, Any], text: str, *, every: int = 1, benign: bool = False
) -> dict[str, int]:
    """Let every N-th call fail; count the cases by what came of them."""
    counts = {"cases": 0, "aborted": 0, "succeeded": 0}
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []
        train_and_save(tmp_path / "count", lambda: seen.append(make(patch, tmp_path / "count", 10**9)) or seen[0], settings)
        total = len(seen[0].calls)
    assert total > 3
    for at in range(0, total, every):
        path = tmp_path / f"{at}"
        start = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            made: list[Any] = []
            told, errors = train_and_save(
                path, lambda: made.append(make(patch, path, at)) or made[0], with_mirror(settings, path)
            )
        what = f"call {at}, {made[0].calls[at : at + 1]}"
        assert time.monotonic() - start < 30, what
        for error in errors:
            assert text in error, f"{what}: {error}"
            assert "step" in error or "second tier" in error, f"{what}: {error}"
        newest = restored(path)
        assert newest is not None and newest >= max(told), f"{what}: {newest} of {told}; {errors}"
        assert not (benign and errors), f"{what}: {errors}"
        with Checkpointer(path, group=SINGLE) as ckpt:  # and the run goes on
            ckpt.save(9, {"run": Flat(expected(9))}).wait()
        assert restored(path) == 9
        counts["cases"] += 1
        counts["aborted" if errors else "succeeded"] += 1
        assert [one.name for one in threading.enumerate() if one.name.startswith("checkpoint")] == [], what
    return counts


def with_mirror(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    return settings if "mirror" not in settings else settings | {"mirror": path.with_name(f"{path.name}-safe")}


SWEEPS = [
    (errno.EIO, True, {}), (errno.EIO, False, {}), (errno.ENOSPC, True, {}), (errno.ENOSPC, False, {}),
    (errno.ENOMEM, True, {}), (errno.ENOMEM, False, {}), (errno.EIO, True, {"incremental": True}),
    (errno.ENOSPC, False, {"incremental": True}), (SHORT, True, {}), (SHORT, False, {}),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "once", "settings"), SWEEPS)
def test_the_nth_system_call_fails(tmp_path, record_property, fault, once, settings):
    def make(patch, path, at):
        return Faults(patch, path, at, fault, once=once)

    text = "" if fault == SHORT else os.strerror(fault)
    counts = sweep(tmp_path, make, settings, text, benign=fault == SHORT)
    assert fault == SHORT or counts["aborted"] > 5
    record_property("nth_call", counts)


@pytest.mark.parametrize("once", [True, False])
def test_memory_or_threads_run_out(tmp_path, record_property, once):
    counts = sweep(tmp_path, lambda patch, path, at: Shortage(patch, at, once=once), {}, "")
    record_property("nth_call", counts)
