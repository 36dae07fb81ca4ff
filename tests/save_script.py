"""A process that saves, and says `durable N` where `wait` returned: small enough to be killed at every call of its own.

    python -m tests.save_script serve      reads a JSON list [folder, step, ...] and the flags of strace on each line

Every line runs in a process forked from this one, which has torch imported, with strace attached to it; the answer is
{"status": exit code or minus the signal, "output": what it said, "hits": how often strace interfered}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from tests.flat_states import Flat


def state(step: int) -> dict[str, Any]:
    """What a step holds."""
    base = torch.arange(20_000.0)
    return {"w": torch.full((30_000,), float(step)), "small": torch.full((5,), step), "step": step, "base": base}


def save(folder: str, *steps: int) -> int:
    """Save the steps one after the other, incrementally; return 3 when one of them failed."""
    code = 0
    with Checkpointer(folder, group=SINGLE, keep=KeepLast(2), incremental=True, timeout_s=30) as ckpt:
        if (newest := ckpt.latest()) is not None:
            ckpt.adopt(newest)
        for step in steps:
            try:
                ckpt.save(step, {"run": Flat(state(step))}).wait()
                tell(f"durable {step}")
            except CheckpointError as error:
                code = 3
                tell(f"failed {step}: {error}")
    return code


def tell(text: str) -> None:
    """Say a line, by a call that saving does not use."""
    os.writev(1, [f"{text}\n".encode()])


def traced(arguments: list[Any], flags: list[str]) -> dict[str, Any]:
    """Save in a forked process under strace."""
    folder, *steps = arguments
    told, log = Path(f"{folder}.told"), Path(f"{folder}.strace")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.read(reader, 1)  # until strace is there
        code = 1
        try:
            code = save(folder, *steps)
        finally:
            os._exit(code)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), *flags, "-p", str(pid)], stderr=subprocess.PIPE)
    give_up = time.monotonic() + 20
    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > give_up:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return {"status": None, "output": (tracer.stderr.read() if tracer.stderr else b"").decode(), "hits": 0}
        time.sleep(0.002)
    os.write(writer, b"x")
    _, status = os.waitpid(pid, 0)
    tracer.wait(20)
    os.close(reader)
    os.close(writer)
    text = log.read_text()
    hits = text.count("(INJECTED)") + text.count("+++ killed by SIGKILL")
    calls = sum(1 for line in text.splitlines() if " = " in line and "resumed>" not in line) + text.count("resumed>")
    return {"status": os.waitstatus_to_exitcode(status), "output": told.read_text(), "hits": hits, "calls": calls}


if __name__ == "__main__":
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(traced(given["save"], given["strace"])), flush=True)
