"""A job under torchrun's elastic agent, watched from outside: its ranks, what it prints, whether it trains."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from launch.errors import LaunchError

POLL_S = 0.01
_TAIL_CHARS = 3000
_START = re.compile(r"^.* chunks of \d+ tokens, retain ", re.MULTILINE)
"""A line of `describe_job`: a start of the job that has its data and its model."""
_STEP = re.compile(r"^step (\d+)/\d+  loss ", re.MULTILINE)


class ChaosError(LaunchError):
    """A job did not survive what was done to it, or hangs; the message has the end of its output."""


class Job:
    """One job: torchrun, once a host, and the ranks below it."""

    def __init__(self, flags: Sequence[str], log: Path, *, ranks: int, restarts: int, hosts: int = 1) -> None:
        """Start it. With more `hosts`, as many torchruns share the ranks; the job goes on with those that are left."""
        self.num_ranks, self.log = ranks, log
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        rest = [
            "--nproc-per-node", str(ranks // hosts), "--max-restarts", str(restarts), "-m", "launch.finetune", *flags,
        ]  # fmt: skip
        with log.open("ab") as output:
            self.hosts = [
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *meeting, *rest],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                )
                for meeting in ([["--standalone"]] if hosts == 1 else _elastic_hosts(hosts))
            ]  # fmt: skip

    def ranks(self) -> frozenset[int]:
        """Return the processes of the ranks that are running."""
        return frozenset(pid for host in self.hosts for pid in children(host.pid) if alive(pid))

    def ended(self) -> int | None:
        """Return the exit code, None while a torchrun runs."""
        codes = [host.poll() for host in self.hosts]
        return None if None in codes else max(map(abs, filter(None, codes)), default=0)

    def lose_host(self, number: int) -> None:
        """kill -9, one torchrun and its ranks; the job is that of the others from now on."""
        host = self.hosts.pop(number)
        lost = children(host.pid)
        for pid in [host.pid, *lost]:
            signal_process(pid, signal.SIGKILL)
        host.wait()
        self.num_ranks -= len(lost)

    def output(self) -> str:
        """Return everything that was printed."""
        return self.log.read_text(errors="replace")

    def starts(self) -> int:
        """Return how often the job has got as far as its data and model."""
        return len(_START.findall(self.output()))

    def step(self) -> int:
        """Return the last step that was trained since the last start, 0 for none."""
        text = self.output()
        since = [match.end() for match in _START.finditer(text)]
        steps = _STEP.findall(text, since[-1]) if since else []
        return int(steps[-1]) if steps else 0

    def wait_until(self, ready: Callable[[], bool], *, what: str, timeout_s: float) -> bool:
        """Return True once `ready()`, False when the job has ended before.

        Raises ChaosError when nothing new was printed for `timeout_s`: it hangs.
        """
        seen, deadline = -1, 0.0
        while self.ended() is None:
            if ready():
                return True
            if (size := self.log.stat().st_size) != seen:
                seen, deadline = size, time.monotonic() + timeout_s
            if time.monotonic() > deadline:
                raise ChaosError(f"waiting for {what}: nothing new for {timeout_s:g} s; the end of {self.tail()}")
            time.sleep(POLL_S)
        return False

    def tail(self) -> str:
        """Return where the output is, and its end."""
        return f"{self.log}:\n{self.output()[-_TAIL_CHARS:]}"

    def kill(self) -> None:
        """kill -9, torchrun and ranks, if they run."""
        ranks = self.ranks()
        for pid in [*(host.pid for host in self.hosts if host.poll() is None), *ranks]:
            signal_process(pid, signal.SIGKILL)
        for host in self.hosts:
            host.wait()


def _elastic_hosts(hosts: int) -> list[list[str]]:
    """Meet over a store of the first one; a host that is silent for seconds is gone, and the others begin again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    conf = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    return [
        [
            "--nnodes", f"1:{hosts}", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
            "--rdzv-id", f"chaos-{port}", "--local-addr", "127.0.0.1", "--rdzv-conf", f"{conf}{int(number == 0)}",
        ]
        for number in range(hosts)
    ]  # fmt: skip


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    """Return whether a process runs, or could: one that has ended and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def signal_process(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return whether there was a process that could get it."""
    if not alive(pid):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
