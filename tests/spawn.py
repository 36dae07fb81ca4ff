"""Run a function on N real ranks: processes with a gloo default group, the one way tests use several processes.

    def total(rank_info, value):
        x = torch.tensor([value + rank_info.rank])
        dist.all_reduce(x)
        return x.item()

    def test_total():
        assert run_ranks(total, 2, 10) == [21, 21]

Importing torch and transformers costs seconds a rank, so ranks are kept warm for the whole session.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MAX_WARM_RANKS = 4
START_TIMEOUT_S = 120
GRACE_S = 5
LOG_TAIL_CHARS = 6000


class SpawnError(AssertionError):
    """A rank failed, died or got stuck; the text holds its traceback, or its stack and the end of its output."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Who a rank is; the first argument of every function given to `run_ranks`."""

    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Report:
    """What came back from one rank."""

    rank: int
    value: Any = None
    failure: str | None = None
    time_s: float = 0.0
    alive: bool = True


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60,
    fresh: bool = False,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return `[fn(RankInfo(rank, world_size), *args) for rank in range(world_size)]`, each run on a rank of its own.

    `fn` is a module-level function of a test module; arguments and results are pickled. `env` is added to the
    environment of the ranks for this call. `fresh=True` starts new processes, for tests that kill or pollute a rank;
    otherwise ranks are reused, with threads, default dtype and seed reset before each call.

    Raises SpawnError with the traceback of the rank that failed first, or after `timeout_s` with the stacks of the
    ranks that are stuck.
    """
    task = _pickled_task(fn, args)
    if fresh:
        ranks = [_Rank(env, is_kept=False) for _ in range(world_size)]
        try:
            return _run(ranks, task, timeout_s, {})
        finally:
            _kill(ranks)
    if world_size > MAX_WARM_RANKS:
        raise ValueError(f"{world_size} ranks asked of a pool of at most {MAX_WARM_RANKS}; use fresh=True")
    while len(_pool) < world_size:
        _pool.append(_Rank())
    try:
        return _run(_pool[:world_size], task, timeout_s, dict(env or {}))
    except BaseException as error:
        if not (isinstance(error, SpawnError) and all(rank.idle for rank in _pool)):
            close_pool()
        raise


def close_pool() -> None:
    """End the warm ranks; the next call of `run_ranks` starts new ones."""
    _kill(_pool)
    _pool.clear()


class _Rank:
    """One process that runs tasks; it leads its own process group, so whatever it started ends with it."""

    def __init__(self, env: Mapping[str, str] | None = None, *, is_kept: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self.log = tempfile.NamedTemporaryFile(prefix="rank-", suffix=".log")  # noqa: SIM115 (closed by _kill)
        code = f"from tests.spawn_rank import serve; serve({theirs.fileno()}, {os.getpid()}, is_kept={is_kept})"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.warm = False
        self.idle = True

    def output(self) -> str:
        return Path(self.log.name).read_text(errors="replace")[-LOG_TAIL_CHARS:]


_pool: list[_Rank] = []  # the session's warm ranks: what makes `run_ranks` fast without a fixture
atexit.register(close_pool)


def _pickled_task(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    if fn.__qualname__ != fn.__name__:
        raise ValueError(f"{fn.__qualname__} is not a module-level function; ranks import it by name, so move it out")
    return pickle.dumps((fn, args))


def _run(ranks: Sequence[_Rank], task: bytes, timeout_s: float, env: Mapping[str, str]) -> list[Any]:
    cold = {n: rank for n, rank in enumerate(ranks) if not rank.warm}
    started = _collect(cold, START_TIMEOUT_S)
    _raise_first_failure(started, cold, f"did not start within {START_TIMEOUT_S} s")
    for rank in cold.values():
        rank.warm = True

    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        for n, rank in enumerate(ranks):
            header = {"rank": n, "world_size": len(ranks), "folder": folder, "timeout_s": timeout_s, "env": env}
            # A rank that died since its last call is found by _collect, with its exit code.
            with suppress(OSError):
                rank.connection.send_bytes(pickle.dumps(header))
                rank.connection.send_bytes(task)
        every = dict(enumerate(ranks))
        reports = _collect(every, timeout_s)
        _raise_first_failure(reports, every, f"stuck for {timeout_s} s")
    return [reports[n].value for n in every]


def _collect(ranks: Mapping[int, _Rank], timeout_s: float) -> dict[int, Report]:
    """Wait for one report of each rank; after a failure the others get only `GRACE_S` more."""
    reports: dict[int, Report] = {}
    deadline = time.monotonic() + timeout_s
    for rank in ranks.values():
        rank.idle = False
    while waiting := {rank.connection: n for n, rank in ranks.items() if n not in reports}:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            n = waiting[connection]
            reports[n] = _receive(n, ranks[n])
            ranks[n].idle = reports[n].alive
            if reports[n].failure is not None:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return reports


def _receive(n: int, rank: _Rank) -> Report:
    try:
        value, failure, time_s = pickle.loads(rank.connection.recv_bytes())
    except (EOFError, ConnectionError):
        code = rank.process.wait(GRACE_S)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        failure = f"it {how} before it returned; the end of its output:\n{rank.output()}"
        return Report(n, failure=failure, time_s=time.monotonic(), alive=False)
    return Report(n, value, failure, time_s)


def _raise_first_failure(reports: Mapping[int, Report], ranks: Mapping[int, _Rank], stuck_how: str) -> None:
    world_size = len(ranks)
    failed = sorted((r for r in reports.values() if r.failure is not None), key=lambda r: r.time_s)
    if failed:
        others = [r.rank for r in failed[1:]]
        after = f"\n(failed after it: ranks {others})" if others else ""
        raise SpawnError(f"rank {failed[0].rank} of {world_size} failed: {failed[0].failure}{after}")
    stuck = [n for n in ranks if n not in reports]
    if stuck:
        stacks = "".join(f"\n--- rank {n} ---\n{_stack(ranks[n])}" for n in stuck)
        raise SpawnError(f"ranks {stuck} of {world_size} {stuck_how}; their output and stacks:{stacks}")


def _stack(rank: _Rank) -> str:
    """Output of a stuck rank, its stacks last: faulthandler writes them on SIGUSR1."""
    if rank.warm:  # a rank that is still starting may not have a handler yet, and would die
        rank.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
    return rank.output()


def _kill(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
        rank.connection.close()
        rank.log.close()
