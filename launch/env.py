"""Who this process is in the job, and on which device: the only reader of what torchrun sets in the environment."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from launch.board import Board
from launch.errors import WorldError
from launch.stop import heeded

TIMEOUT_S = 600.0
"""How long a rank waits for another: to appear, to answer, and in a collective."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among those of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0
    """How often torchrun has started the job again after a failure."""
    launched: bool = False
    """Started by torchrun, or by something that sets the same variables."""
    keeps_store: bool = False
    """The job's store is torchrun's own, and outlives the ranks."""


@dataclass(frozen=True, slots=True)
class World:
    """The job's processes, found and connected."""

    rank: int
    world_size: int
    device: torch.device
    board: Board


def read_processes(environ: Mapping[str, str] = os.environ) -> Processes:
    """Return who this process is; without torchrun, the only one. Raises WorldError on a half-set environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return Processes()
    if missing:
        raise WorldError(f"{', '.join(missing)} not set, but other variables of torchrun are; start it with torchrun")
    try:
        rank, world_size, local_rank = (int(environ[name]) for name in names[:3])
        restarts = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except ValueError as error:
        raise WorldError(f"a variable of torchrun is no whole number ({error}); start it with torchrun") from error
    if not 0 <= rank < world_size:
        raise WorldError(f"RANK is {rank} and WORLD_SIZE is {world_size}; start it with torchrun")
    keeps_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return Processes(
        rank=rank, world_size=world_size, local_rank=local_rank, restarts=restarts, launched=True,
        keeps_store=keeps_store,
    )  # fmt: skip


def end_with_launcher(processes: Processes) -> None:
    """Let the kernel kill this process when torchrun is killed, which otherwise leaves it training on, unattended.

    On Linux only; elsewhere the lock of the run's folder still keeps two jobs apart.
    """
    if processes.launched:
        end_with_parent()


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, however that ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def joined(processes: Processes, *, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Connect to the other ranks as the default process group, and leave it at the end. Every rank calls."""
    with _ends_on_signals():
        device, kept, store = _connect(processes, timeout_s)
    board = Board(
        store, rank=processes.rank, world_size=processes.world_size, timeout_s=timeout_s,
        kept=kept if processes.keeps_store else None,
    )  # fmt: skip
    try:
        yield World(processes.rank, processes.world_size, device, board)
    finally:
        dist.destroy_process_group()


def _connect(processes: Processes, timeout_s: float) -> tuple[torch.device, Store, Store]:
    """Make the default process group; return this rank's device, the job's store, and that of this start of the job."""
    kept = _meet(processes, timeout_s)
    # torchrun keeps its store when it starts the ranks again, with addresses and answers of ranks that are gone.
    store = PrefixStore(f"attempt/{processes.restarts}", kept)
    device = choose_device(processes.local_rank)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore("default", store),
        rank=processes.rank,
        world_size=processes.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return device, kept, store


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Let what asks for a stop end the process at once: there is nothing to save yet, and Python's own handlers would
    run when the ranks have found each other, or never."""
    if threading.current_thread() is not threading.main_thread():  # which alone sets handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def prepare_deepspeed(device: torch.device, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell DeepSpeed, which reads it on import, what it would guess otherwise; call before that."""
    environ.setdefault("DS_ACCELERATOR", device.type)
    environ.setdefault("LOCAL_RANK", str(device.index or 0))


def choose_device(local_rank: int) -> torch.device:
    """Return this rank's accelerator, made current, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise WorldError(f"local rank {local_rank} has no device of its own, {count} are here; lower --nproc-per-node")
    torch.accelerator.set_device_index(local_rank)
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, local_rank)


def _meet(processes: Processes, timeout_s: float) -> Store:
    if not processes.launched:
        return HashStore()
    try:
        store, _, _ = next(
            rendezvous("env://", processes.rank, processes.world_size, timeout=timedelta(seconds=timeout_s))
        )
    except (dist.DistError, ValueError) as error:
        raise WorldError(f"the job's store could not be reached within {timeout_s:g} s: {error}") from error
    return store
