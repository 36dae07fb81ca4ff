"""torchrun's own agent with its ranks, in a process of its own, for tests that kill ranks.

Ranks come from a fork server, which has imported torch and has no threads: forked from the agent itself, one rank in
some hundred hangs before its first line.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.env import Processes, end_with_launcher

RANKS = 2
ENDED = "ended"
"""The name of a rank's process once it has done its part."""


class Agent:
    """torchrun's agent with its ranks, in a process of its own."""

    def __init__(self, log: Path, kills: int, entry: Callable[..., Any], *args: Any) -> None:
        # More than there are kills: a rank whose peer was killed while they connected fails by itself.
        self.log, restarts = log, 2 * kills
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_serve(log, restarts, entry, args))

    def ranks(self) -> list[int]:
        """The processes of the ranks that are running."""
        return [pid for server in _children(self.pid) for pid in _children(server) if alive(pid)]

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return None
            self._code, self.pid = os.waitstatus_to_exitcode(status), 0
        return self._code

    def end(self) -> None:
        """kill -9, agent and ranks."""
        if self.ended() is None:
            for pid in [*self.ranks(), self.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _serve(log: Path, restarts: int, entry: Callable[..., Any], args: tuple[Any, ...]) -> int:
    end_with_launcher(Processes(launched=True))
    multiprocessing.set_forkserver_preload(["__main__", "launch.finetune"])
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.02, start_method="forkserver",
    )  # fmt: skip
    try:
        elastic_launch(config, _rank)(entry, *args)
    except BaseException as error:  # noqa: BLE001 - a forked process has nowhere to raise to
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _rank(entry: Callable[..., Any], *args: Any) -> None:
    end_with_launcher(Processes(launched=True))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent's handlers, which a process of its own would not have
    faulthandler.register(signal.SIGUSR1)
    entry(*args)
    Path("/proc/self/comm").write_text(ENDED)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    with suppress(OSError):
        return state_of(pid) != "Z"
    return False


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def strike(pid: int) -> bool:
    """kill -9, unless the rank has done its part; return whether it was killed.

    What follows is the closing handshake of torchrun's agent with functions, which deadlocks when a rank dies in it (as
    its source says). With scripts there is none.
    """
    with suppress(OSError):
        os.kill(pid, signal.SIGSTOP)
        while (state := state_of(pid)) not in "TZ":
            time.sleep(0.001)
        ended = Path(f"/proc/{pid}/comm").read_text().strip() == ENDED
        os.kill(pid, signal.SIGCONT if ended else signal.SIGKILL)
        return state == "T" and not ended
    return False
