"""Faults that the kernel's own door injects, behind Python and behind our seam: `strace -e inject=...`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpointing import SINGLE, Checkpointer
from tests.flat_states import Flat, same
from tests.save_script import save, state
from tests.spawn import ROOT

STEPS = (3, 4, 5)


@pytest.fixture(scope="module")
def server():
    """A process that saves under strace on request."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.save_script", "serve"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(folder: Path, *flags: str) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"save": [str(folder), *STEPS], "strace": flags}) + "\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        if found["status"] is None:
            pytest.skip(f"strace cannot attach here: {found['output'].strip()}")
        return found

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert save(str(folder), 1, 2) == 0
    return folder


def restored(folder: Path) -> int:
    with Checkpointer(folder, group=SINGLE) as ckpt:
        back = Flat({})
        info = ckpt.restore({"run": back})
        assert info is not None
        assert same(back.loaded, state(info.step))
        ckpt.save(9, {"run": Flat(state(9))}).wait()
        assert ckpt.restore({"run": back}).step == 9
        return info.step


ALL = ("pwrite64", "write", "fsync", "rename", "ftruncate", "fallocate", "mkdir", "link", "unlink", "rmdir", "close")
QUICK = [("pwrite64", "signal=KILL"), ("rename", "signal=KILL"), ("fsync", "error=EIO"), ("rename", "error=EIO")]
FULL = [(call, what) for what in ("signal=KILL", "error=EIO", "error=ENOSPC") for call in ALL[:-1]]


def sweep(server: Any, begun: Path, tmp_path: Path, call: str, what: str, numbers: Any) -> dict[str, int]:
    counts = {"cases": 0, "killed": 0, "failed_saves": 0}
    for number in numbers:
        folder = Path(shutil.copytree(begun, tmp_path / f"{call}-{number}"))
        found = server(folder, "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}")
        text = f"{call} {number} {what}: {found}"
        if not found["hits"]:  # there are no more calls of this kind
            assert number > 1, text
            break
        told = [int(line.split()[1]) for line in found["output"].splitlines() if line.startswith("durable")]
        assert found["status"] in ((-9,) if "KILL" in what else (0, 3)), text
        if found["status"] == 3:
            assert "failed" in found["output"], text
            assert ("Input/output error" if "EIO" in what else "No space left") in found["output"], text
        newest = restored(folder)
        assert max(told, default=2) <= newest <= STEPS[-1], f"{text}: {newest}"
        counts["cases"] += 1
        counts["killed"] += "KILL" in what
        counts["failed_saves"] += found["status"] == 3
        shutil.rmtree(folder)
    return counts


@pytest.mark.parametrize(("call", "what"), QUICK)
def test_some_calls(server, begun, tmp_path, record_property, call, what):
    counts = sweep(server, begun, tmp_path, call, what, (1, 2, 3))
    assert counts["cases"] == 3
    record_property("strace", counts)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "what"), FULL)
def test_every_call(server, begun, tmp_path, record_property, call, what):
    counts = sweep(server, begun, tmp_path, call, what, range(1, 60))
    record_property("strace", counts)
