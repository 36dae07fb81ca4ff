"""Jobs of two ranks under torchrun, started as users start them, and what their ranks report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD_SIZE), "-m"]
_TOLD = 4000
"""Letters of a failed job's output that are shown."""


def torchrun(module: str, arguments: Sequence[str], *, deadline_s: float) -> list[dict[str, Any]]:
    """Run `MODULE FOLDER ARGUMENTS` on two ranks of one thread; return what each wrote by `tell`, by rank.

    `launched` is added to each: the moment, on the monotonic clock that all processes share, at which torchrun was
    started. Raises RuntimeError, with the end of its output, when the job fails or takes longer than `deadline_s`; none
    of its processes is left then.
    """
    with tempfile.TemporaryDirectory(prefix="bench-job-") as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, *TORCHRUN, module, folder, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        launched = time.monotonic()
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = job.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(job)
        if code != 0:
            log.seek(0)
            how = f"not done after {deadline_s:g} s" if code is None else f"exit code {code}"
            raise RuntimeError(f"{module}: {how}\n{log.read()[-_TOLD:]}")
        reports = [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
    return [{**report, "launched": launched} for report in reports]


def _end(job: subprocess.Popen[bytes]) -> None:
    if job.poll() is None:
        try:
            os.killpg(job.pid, signal.SIGTERM)  # torchrun ends its ranks; theirs is another session
            job.wait(timeout=30)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()


def tell(folder: str | Path, rank: int, report: dict[str, Any]) -> None:
    """Leave what this rank measured for whoever started the job."""
    path = Path(folder) / f"rank-{rank}.json"
    path.write_text(json.dumps(report, default=lambda scalar: scalar.item()))


def born() -> float:
    """Return when this process began, on the monotonic clock; to a hundredth of a second, on Linux."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age
