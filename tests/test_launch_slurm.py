"""launch/slurm.sbatch on a real Slurm of two nodes: preempted, out of time, or with a node lost, it is queued again."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.chaos_compare import require_same
from launch.files import RunFolder
from tests import slurm_cluster
from tests.launch_jobs import run_job, settings, write_corpus
from tests.spawn import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
DEADLINE_S = 200

needs_slurm = pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=f"{slurm_cluster.why_not()}")


def test_the_script_is_one():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=20)
    text = SCRIPT.read_text()
    assert "#SBATCH --requeue\n" in text
    assert "\n#SBATCH" not in text.partition("\nset -u")[2]  # Slurm reads none behind the first command


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(850)
def test_a_job_that_is_interrupted_is_requeued_and_ends_as_if_it_never_was(tmp_path, monkeypatch):
    """By a job of higher priority, by the signal of its time limit, and by the loss of a node."""
    monkeypatch.setattr("tests.launch_jobs.DEADLINE_S", DEADLINE_S)
    corpus = write_corpus(tmp_path / "corpus")
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {"run__epochs": 24, "run__eval_every": 1000, "checkpoint__every": 1000, "run__log_every": 1}
    code, output = run_job(settings(corpus, whole, **changes), tmp_path / "whole.log")
    assert code == 0, output
    with slurm_cluster.cluster(tmp_path / "slurm") as found:
        log = tmp_path / "job.log"
        job = submit(found, log, settings(corpus, run, **changes), "-p", "low")
        wait_for(lambda: newest_step(log) >= 5, log, found)
        found.run("sbatch", "-p", "high", "--nodes", "2", f"--output={tmp_path}/high.log", "--wrap", "sleep 2")
        first = saved_at(log, 1, found)
        wait_for(lambda: f"Resuming after step {first}, from" in read(log), log, found)
        wait_for(lambda: newest_step(log) > first, log, found)
        found.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm sends when the time limit comes near
        second = saved_at(log, 2, found)
        resumed = f"Resuming after step {second}, from"
        wait_for(lambda: resumed in read(log), log, found)
        wait_for(lambda: newest_step(log) > second, log, found)
        found.lose("n2")  # and nobody can save
        wait_for(lambda: restarts(job, found) == 3, log, found)
        found.start_node("n2")
        wait_for(lambda: read(log).count(resumed) == 2, log, found)
        wait_for(lambda: (run / "summary.json").exists(), log, found)
        wait_for(lambda: "JobState=COMPLETED" in found.run("scontrol", "show", "job", job), log, found)
        assert restarts(job, found) == 3
    assert 5 <= first < second < 264  # none is saved but when asked
    require_same(RunFolder(run), RunFolder(whole))


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(850)
def test_a_time_limit_that_comes_near_has_the_job_saved_and_queued_again(tmp_path):
    """Slurm itself sends the signal that the script asks for: 3 minutes before, and up to one more, as it says."""
    flags = settings(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", run__epochs=10_000, run__eval_every=10**6,
        checkpoint__every=10**6, run__log_every=1,
    )  # fmt: skip
    with slurm_cluster.cluster(tmp_path / "slurm") as found:
        log = tmp_path / "job.log"
        job = submit(found, log, flags, "-p", "low", "--time", "4")
        saved = saved_at(log, 1, found)
        wait_for(lambda: f"Resuming after step {saved}, from" in read(log), log, found)
        wait_for(lambda: newest_step(log) > saved, log, found)
        assert restarts(job, found) == 1
        found.run("scancel", job)
        wait_for(lambda: "JobState=CANCELLED" in found.run("scontrol", "show", "job", job), log, found)
        saved_at(log, 2, found)  # whoever cancels a job loses nothing either


def submit(found, log: Path, flags: list[str], *options: str) -> str:
    """Submit a job of two nodes; return its number."""
    environment = f"ALL,PYTHON={sys.executable},PYTHONPATH={ROOT},PYTHONUNBUFFERED=1,OMP_NUM_THREADS=1"
    words = ["sbatch", "--parsable", "--nodes", "2", f"--output={log}", f"--export={environment}", *options]
    return found.run(*words, str(SCRIPT), *flags)


def restarts(job: str, found) -> int:
    return int(re.findall(r"Restarts=(\d+) ", found.run("scontrol", "show", "job", job))[0])


def saved_at(log: Path, times: int, found) -> int:
    """The step that was saved when the job was asked to stop for the so many-th time."""
    wait_for(lambda: read(log).count("Asked to stop: saved after step") >= times, log, found)
    return int(re.findall(r"Asked to stop: saved after step (\d+)", read(log))[times - 1])


def newest_step(log: Path) -> int:
    return max(map(int, re.findall(r"^step (\d+)/\d+  loss", read(log), re.MULTILINE)), default=0)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for(ready, log, found):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if ready():
            return
        time.sleep(0.05)
    queue = found.run("squeue", "--format=%i %P %T %r")
    raise AssertionError(f"not within {DEADLINE_S} s:\n{read(log)[-3000:]}\n{queue}\n{found.logs()}")
