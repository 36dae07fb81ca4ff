"""Ranks that a benchmark has started as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch.env import end_with_parent


def run_ranks(module: str, options: Mapping[str, Any], *, ranks: int, deadline_s: float) -> list[dict[str, Any]]:
    """Run `python -m MODULE RANK FOLDER OPTIONS` for every rank, one thread each; return what they wrote to rows.jsonl.

    Raises RuntimeError as soon as one fails, or after `deadline_s`; none of them is left then.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as started:
        processes = []
        for rank in range(ranks):
            command = [sys.executable, "-m", module, str(rank), folder, json.dumps(options)]
            process = start_rank(command)
            started.callback(process.wait)
            started.callback(process.kill)
            processes.append(process)
        wait_for(processes, deadline_s=deadline_s)
        return [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]


def start_rank(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, own_session: bool = False
) -> subprocess.Popen[bytes]:
    """Start a rank of one thread, which ends when this process does, however that ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, env=env, preexec_fn=end_with_parent, start_new_session=own_session)


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], *, deadline_s: float) -> None:
    """Wait for all ranks; raise RuntimeError as soon as one fails, or after `deadline_s`."""
    deadline = time.monotonic() + deadline_s
    while True:
        codes = [r.poll() for r in ranks]
        failed = [i for i, code in enumerate(codes) if code]
        if failed or time.monotonic() > deadline:
            raise RuntimeError(f"ranks {failed} failed" if failed else f"not done after {deadline_s} s")
        if None not in codes:
            return
        time.sleep(0.2)
