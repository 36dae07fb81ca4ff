"""The inside of one rank of `tests.spawn`: import what is slow once, then run tasks until the connection closes."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests.spawn import RankInfo

PR_SET_PDEATHSIG = 1


def serve(fd: int, parent: int, *, is_kept: bool) -> None:
    """Answer "ready" once warm, then one answer a task: `(value, None, time)` or `(None, traceback, time)`.

    A rank that is kept for other tasks imports what most of them need; another what its one task does.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    import torch

    if is_kept:
        import transformers  # noqa: F401 (warmed)

    torch.set_num_interop_threads(1)
    connection = Connection(fd)
    _answer(connection, None, None, time.monotonic())
    while True:
        try:
            header, task = pickle.loads(connection.recv_bytes()), connection.recv_bytes()
        except EOFError:
            return
        _answer(connection, *_attempt(header, task))


def _attempt(header: dict[str, Any], task: bytes) -> tuple[Any, str | None, float]:
    import torch.distributed as dist

    before = dict(os.environ)
    os.environ.update(header["env"])
    try:
        return _run(header, task), None, time.monotonic()
    except BaseException:  # noqa: BLE001 (also SystemExit: the driver decides what a failure means)
        # The time of the failure itself: leaving the group below frees, and so fails, the ranks that wait in it.
        return None, traceback.format_exc(), time.monotonic()
    finally:
        # Also what frees the other ranks of a collective that this one will never join.
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _run(header: dict[str, Any], task: bytes) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{header['folder']}/rendezvous",
        rank=header["rank"],
        world_size=header["world_size"],
        # Longer than the driver waits, so that a stuck rank is shown with its stack and not as gloo's timeout.
        timeout=timedelta(seconds=2 * header["timeout_s"] + 10),
    )
    dist.barrier()  # or a task that talks to nobody would end, and its rank hang up on one that is still connecting
    fn, args = pickle.loads(task)
    return fn(RankInfo(header["rank"], header["world_size"]), *args)


def _answer(connection: Connection, value: Any, failure: str | None, time_s: float) -> None:
    try:
        body = pickle.dumps((value, failure, time_s))
    except Exception:  # noqa: BLE001 (anything may fail to pickle)
        body = pickle.dumps((None, f"its result cannot be pickled:\n{traceback.format_exc()}", time_s))
    connection.send_bytes(body)
