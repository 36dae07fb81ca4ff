"""Real jobs of a few seconds: a tiny corpus, a tiny model, started by torchrun as users start them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.spawn import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEADLINE_S = 90
MODEL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "max_positions": 4096}
CHUNKS = {"chunk_tokens": 64, "global_batch": 4, "retain": 2}


def write_corpus(folder: Path, *, files: int = 44) -> Path:
    """Short files of many lengths, and one of some 2,500 tokens."""
    folder.mkdir(parents=True)
    for number in range(files):
        lines = [f"value_{number} = {number} * {line}\n" for line in range(1 + number % 7)]
        (folder / f"file{number:02}.py").write_text("".join(lines))
    (folder / "long.py").write_text("".join(f"total_{n} = {n * n}\n" for n in range(300)))
    return folder


def settings(corpus: Path, run: Path, **changes: object) -> list[str]:
    """The flags of a job; `changes` are by dotted key with __ for the dot."""
    values: dict[str, object] = {
        "run.folder": run, "run.eval_every": 4, "checkpoint.every": 3, "data.path": corpus,
        "data.cache": corpus.parent / "cache", "data.max_file_bytes": None, "data.long_files": ["long.py"],
        "data.held_out": 4, **{f"model.{key}": value for key, value in MODEL.items()},
        **{f"chunks.{key}": value for key, value in CHUNKS.items()},
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip
    flags = []
    for key, value in values.items():
        flags += [f"--{key}", value if isinstance(value, str) else json.dumps(value, default=str).strip('"')]
    return flags


def start(flags: list[str], log: Path, *, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start a job; its output goes to `log`."""
    command = [*TORCHRUN, *(prefix or ("-m", "launch.finetune")), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=log.parent, env=env, stdout=output, stderr=subprocess.STDOUT)


def run_job(flags: list[str], log: Path, *, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run a job to its end; return torchrun's exit code and everything it printed."""
    job = start(flags, log, prefix=prefix)
    try:
        return job.wait(timeout=DEADLINE_S), log.read_text()
    finally:
        kill_job(job)


def workers(job: subprocess.Popen) -> list[int]:
    """The processes of the ranks."""
    path = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def kill_job(job: subprocess.Popen) -> None:
    """kill -9, ranks and torchrun; what has ended already is let be."""
    for pid in [*workers(job), job.pid] if job.poll() is None else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait(timeout=DEADLINE_S)


def wait_for_step(job: subprocess.Popen, metrics: Path, step: int, log: Path) -> None:
    """Return once the job has trained `step` steps; fails when it ends before."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        assert job.poll() is None, f"the job ended before step {step}:\n{log.read_text()}"
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within {DEADLINE_S} s:\n{log.read_text()}")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, whole."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
