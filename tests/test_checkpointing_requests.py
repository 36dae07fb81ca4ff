"""`checkpoint request`: a save that is asked for by another process, waited for, and taken back."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpointing import SINGLE, Checkpointer
from tests.checkpoint_commands import run, run_json
from tests.flat_states import Flat
from tests.spawn import ROOT


def ask(root, *flags):
    command = [sys.executable, "-m", "checkpointing", "request", root, "--wait", "60", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)


def until_heard(ckpt, asked):
    deadline = time.monotonic() + 60
    while not ckpt.requested():
        assert not asked.done(), asked.result()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_is_waited_for(tmp_path):
    """Until the save that takes it away is committed; an earlier one is no answer."""
    with Checkpointer(tmp_path, group=SINGLE) as ckpt, ThreadPoolExecutor(1) as asking:
        ckpt.save(25, Flat({"a": 1})).wait()
        assert ckpt._engine.idle(20)
        asked = asking.submit(ask, tmp_path, "--json")
        until_heard(ckpt, asked)
        ckpt.save(30, Flat({"a": 2})).wait()
        found = asked.result(60)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout) == {
            "path": f"{tmp_path}/request", "already": False, "step": 30, "checkpoint": f"{tmp_path}/step-30",
        }  # fmt: skip
        asked = asking.submit(ask, tmp_path)
        until_heard(ckpt, asked)
        ckpt.save(31, Flat({"a": 2})).wait()
        assert asked.result(60).stdout == f"saved step 31 as {tmp_path}/step-31\n"


def test_a_request_that_nobody_answers_stays_and_the_waiting_ends(tmp_path):
    _, text = run("request", tmp_path, "--wait", 0.2, ok=(1,))
    assert "nothing was saved within 0.2 s; the request stays for a job that runs there" in text
    found = run_json("request", tmp_path, "--wait", 0, ok=(1,))
    assert found == {"path": f"{tmp_path}/request", "already": True, "step": None, "checkpoint": None}
    assert os.listdir(tmp_path) == ["request"]
    assert run("request", tmp_path, "--wait", "inf", ok=(2,))[1] == "--wait is inf; give seconds, at most 1e8"


def test_the_first_save_can_be_asked_for_and_a_job_that_ends_takes_back_what_came_too_late(tmp_path):
    root = tmp_path / "run"
    with Checkpointer(root, group=SINGLE) as ckpt, ThreadPoolExecutor(1) as asking:
        assert not root.exists()
        assert not ckpt.requested()
        asked = asking.submit(ask, root)
        until_heard(ckpt, asked)
        ckpt.close()
        found = asked.result(60)
    assert found.returncode == 1
    assert f"{root}: the job that was asked has ended without another save" in found.stderr
    assert os.listdir(root) == []


def test_a_job_that_fails_leaves_the_request_for_its_next_start(tmp_path):
    run("request", tmp_path)
    ckpt = Checkpointer(tmp_path, group=SINGLE)

    def job():
        with ckpt:
            assert ckpt.requested()
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        job()
    assert os.listdir(tmp_path) == ["request"]
    with Checkpointer(tmp_path, group=SINGLE):  # one that only looks is no job
        pass
    assert os.listdir(tmp_path) == ["request"]


def test_a_save_under_way_may_be_the_answer(tmp_path, monkeypatch):
    """It is durable before the request is gone: asked meanwhile, there would be two saves."""
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        run("request", tmp_path)
        heard, prune = [], ckpt._committer._prune
        monkeypatch.setattr(ckpt._committer, "_prune", lambda: (heard.append(ckpt.requested()), prune()))
        assert ckpt.requested()
        ckpt.save(1, Flat({"a": 1})).wait()
        assert ckpt._engine.idle(20)
        assert heard == [False]
        assert not ckpt.requested()
