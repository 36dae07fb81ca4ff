"""The helper itself: what every multi-process test relies on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.spawn import ROOT, SpawnError, run_ranks


def describe(rank_info, suffix):
    return f"{rank_info.rank}/{rank_info.world_size}{suffix}"


def reduce_ones(rank_info, scale):
    x = torch.full((3,), float(scale))
    dist.all_reduce(x)
    return x


def pid_and_threads(rank_info):
    return os.getpid(), torch.get_num_threads(), torch.get_default_dtype(), os.environ.get("LONGRAIL_TEST")


def pollute(rank_info):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    return os.getpid()


def fail_on(rank_info, bad):
    if rank_info.rank == bad:
        raise RuntimeError(f"deliberate failure of rank {bad}")
    return "fine"


def fail_while_others_reduce(rank_info):
    if rank_info.rank == 1:
        raise RuntimeError("left before the collective")
    dist.all_reduce(torch.ones(1))


def sleep_on(rank_info, sleeper):
    if rank_info.rank == sleeper:
        wait_for_a_day_that_never_comes()


def wait_for_a_day_that_never_comes():
    threading.Event().wait()


def die(rank_info):
    if rank_info.rank == 1:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)


def leave(rank_info):
    os._exit(3)


def unpicklable(rank_info):
    return threading.Lock()


def orphan(rank_info):
    """Start a grandchild that would live for an hour."""
    return subprocess.Popen(["sleep", "3600"]).pid


def ended(pid, within_s=20):
    """Whether the process is gone, or a zombie that nobody has collected yet."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_results_come_in_rank_order_from_warm_processes():
    assert run_ranks(describe, 2, "!") == ["0/2!", "1/2!"]
    first = run_ranks(pid_and_threads, 2)
    assert [pid for pid, *_ in first] == [pid for pid, *_ in run_ranks(pid_and_threads, 2)]
    assert run_ranks(describe, 1, "") == ["0/1"]


def test_collectives_work_and_tensors_come_back():
    for total in run_ranks(reduce_ones, 2, 5):
        torch.testing.assert_close(total, torch.full((3,), 10.0))


def test_a_call_starts_clean():
    pids = run_ranks(pollute, 2)
    after = run_ranks(pid_and_threads, 2, env={"LONGRAIL_TEST": "here"})
    assert after == [(pid, 1, torch.float32, "here") for pid in pids]
    assert [value for *_, value in run_ranks(pid_and_threads, 2)] == [None, None]


def test_the_failing_rank_is_shown_and_the_pool_survives():
    pids = [pid for pid, *_ in run_ranks(pid_and_threads, 2)]
    with pytest.raises(SpawnError, match=r"(?s)rank 1 of 2 failed.*in fail_on.*deliberate failure of rank 1"):
        run_ranks(fail_on, 2, 1)
    assert [pid for pid, *_ in run_ranks(pid_and_threads, 2)] == pids


def test_a_failure_frees_ranks_that_wait_in_a_collective():
    started = time.monotonic()
    with pytest.raises(SpawnError, match=r"(?s)rank 1 of 2 failed.*left before the collective"):
        run_ranks(fail_while_others_reduce, 2, timeout_s=100)
    assert time.monotonic() - started < 50
    assert run_ranks(describe, 2, "") == ["0/2", "1/2"]


def test_an_unpicklable_result_is_a_failure_of_its_rank():
    with pytest.raises(SpawnError, match=r"(?s)rank 0 of 1 failed.*cannot be pickled"):
        run_ranks(unpicklable, 1)


def test_a_timeout_names_the_stuck_ranks_with_their_stacks_and_renews_the_pool():
    before = run_ranks(pid_and_threads, 2)
    with pytest.raises(SpawnError, match=r"(?s)ranks \[1\] of 2 stuck.*rank 1.*wait_for_a_day_that_never_comes"):
        run_ranks(sleep_on, 2, 1, timeout_s=1)
    after = run_ranks(pid_and_threads, 2)
    assert {pid for pid, *_ in before}.isdisjoint(pid for pid, *_ in after)


def test_fresh_ranks_die_alone():
    warm = {pid for pid, *_ in run_ranks(pid_and_threads, 2)}
    with pytest.raises(SpawnError, match=r"(?s)rank 1 of 2 failed: it was killed by SIGKILL.*last words"):
        run_ranks(die, 2, fresh=True)
    assert {pid for pid, *_ in run_ranks(pid_and_threads, 2)} == warm


def test_leaving_and_orphans_are_cleaned_up():
    with pytest.raises(SpawnError, match="exited with code 3 before it returned"):
        run_ranks(leave, 1)
    (pid,) = run_ranks(orphan, 1, fresh=True)
    assert ended(pid)


STARTS = {
    "tests": "from tests.spawn import _Rank; rank = _Rank().process",
    "benchmarks": "from benchmarks.ranks import start_rank; rank = start_rank(['sleep', '3600'])",
    "doctor": "from launch.doctor_ranks import _start; rank = _start(0, 2, pathlib.Path(sys.argv[1]))",
}


@pytest.mark.parametrize("whose", STARTS)
def test_ranks_die_with_the_process_that_started_them(tmp_path, whose):
    """However that ends: SIGTERM runs nothing in Python that could end them."""
    code = f"import os, sys, pathlib; {STARTS[whose]}; print(rank.pid, flush=True); os.kill(os.getpid(), 15)"
    driver = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert driver.returncode == -signal.SIGTERM, driver.stderr
    assert ended(int(driver.stdout), within_s=60)


def test_mistakes_of_the_caller_are_refused():
    with pytest.raises(ValueError, match="not a module-level function"):
        run_ranks(lambda rank_info: None, 1)
    with pytest.raises(ValueError, match="5 ranks asked of a pool of at most 4; use fresh=True"):
        run_ranks(describe, 5, "")
