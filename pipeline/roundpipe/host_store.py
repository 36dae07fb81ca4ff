"""The memory that all ranks of a node share: made by the first, mapped by all, without a name once they have it.

Nothing is left behind when a job ends or crashes: the file is unlinked as soon as every rank has mapped it. Of a rank
that was killed before that, the next job on the machine clears it away: until then the maker holds its lock.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.actions import Phase
from pipeline.errors import PlanError
from pipeline.roundpipe.host_plan import MAX_LOSSES, HostParameter, HostPlan
from pipeline.roundpipe.words import Words

T = TypeVar("T")

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"longrail-store-\d+-[0-9a-f]{16}")
SPARE_BYTES = 16 * 2**20
"""Left free where the store goes: gloo and data loaders use shared memory too."""


class HostStore:
    """Views of the shared memory. Make it with `open_store`."""

    def __init__(self, plan: HostPlan, memory: Tensor, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._memory = memory
        self._of_dtype = {torch.uint8: memory}
        array: Any = memory.numpy()  # a buffer, which numpy's types do not say in Python 3.11
        self._longs = memoryview(array).cast("q")
        self.words = Words(self.region("words"))
        self.losses = self.region("losses").view(torch.float64).view(2, MAX_LOSSES)
        """fp64 [2, MAX_LOSSES], by micro-batch of a run, one row after the other: a rank may be a run ahead of one that
        still reads."""
        self.norms = self.region("norms").view(torch.float64).view(2, len(plan.parameters))
        """fp64 [2, parameters], one row after the other: a rank may be a norm ahead of one that still reads."""

    def region(self, *key: object) -> Tensor:
        """Return a region's bytes, uint8."""
        offset, size = self.plan.regions[key]
        return self._memory[offset : offset + size]

    def weights(self, name: str, version: int = 0) -> Tensor:
        """Return a parameter as it is after `version` optimizer steps of a run."""
        p = self.plan.parameters[name]
        return self._shaped(p, "weights", name, version % (1 + self.plan.staleness) if p.trained else 0)

    def gradient(self, name: str, layer: int) -> Tensor:
        """Return what a layer adds to a parameter's gradient."""
        return self._shaped(self.plan.parameters[name], "gradient", name, layer)

    def header(self, phase: Phase, boundary: int, microbatch: int, turn: int) -> memoryview:
        """Return the words of an activation's or gradient's header, int64 [HEADER_WORDS]."""
        offset, size = self.plan.boundary("header", phase, boundary, microbatch, turn)
        return self._longs[offset // 8 : (offset + size) // 8]

    def room(
        self, phase: Phase, boundary: int, microbatch: int, turn: int, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        """Return an activation or gradient itself. It has to fit, see `HostPlan.boundary_bytes`."""
        offset, _ = self.plan.boundary("boundary", phase, boundary, microbatch, turn)
        if dtype not in self._of_dtype:
            self._of_dtype[dtype] = self._memory.view(dtype)
        first = offset // dtype.itemsize
        return self._of_dtype[dtype][first : first + math.prod(shape)].view(shape)

    def say(self, text: str) -> None:
        """Write down why a rank gives up."""
        data = text.encode()[: self.plan.regions["text",].size - 8]
        region = self.region("text")
        region[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        region[:8].view(torch.int64)[0] = len(data)

    def said(self) -> str:
        """Return what was written down."""
        region = self.region("text")
        return bytes(region[8 : 8 + int(region[:8].view(torch.int64)[0])].tolist()).decode(errors="replace")

    def fill(self, values: Callable[[str], Tensor]) -> None:
        """Copy every parameter into the store. By one rank, before the first run."""
        with torch.no_grad():
            for name in self.plan.parameters:
                self.weights(name).copy_(values(name))

    def _shaped(self, p: HostParameter, *key: object) -> Tensor:
        return self.region(*key).view(p.dtype).view(p.shape)


def open_store(
    plan: HostPlan,
    group: dist.ProcessGroup | None,
    *,
    folders: Sequence[Path] = (SHARED_MEMORY,),
    spare_bytes: int = SPARE_BYTES,
) -> HostStore:
    """Return the store of a plan; every rank of `group` calls (None: one process). Its bytes are zero.

    The first of `folders` with room is taken: /dev/shm, then perhaps one on a disk, where the store is a mapped file.
    Raises PlanError on every rank when none has room, or when the ranks are not on one machine; nothing is left then.
    """
    rank = 0 if group is None else dist.get_rank(group)
    made, error = _attempt(lambda: _make(plan.size, folders, spare_bytes)) if rank == 0 else (None, None)
    try:
        (path, host, error) = from_first((made and made[0], socket.gethostname(), error), group)
        if error is not None:
            raise PlanError(error)
        memory, error = _attempt(lambda: torch.from_file(path, shared=True, size=plan.size, dtype=torch.uint8))
        if error is not None:
            here = socket.gethostname()
            error = (
                f"rank {rank} on {here} cannot map {path}, which rank 0 made on {host}: {error}. RoundPipe's ranks "
                "share memory, so all of them have to be on one machine"
            )
        for problem in _from_all(error, group):
            if problem is not None:
                raise PlanError(problem)
    finally:  # also when another rank is lost before it has mapped it
        if made is not None:
            os.unlink(made[0])
            os.close(made[1])
    assert memory is not None
    return HostStore(plan, memory, Path(path).parent)


def _make(size: int, folders: Sequence[Path], spare_bytes: int) -> tuple[str, int]:
    """Make a file with room for all of it; return its path, and what holds its lock."""
    problems = []
    for folder in folders:
        try:
            _clear(folder)
            stat = os.statvfs(folder)
            free = stat.f_bavail * stat.f_frsize
            if free < size + spare_bytes:
                problems.append(f"{folder} has {free:,} bytes free")
                continue
            return _reserve(folder, size)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    raise PlanError(
        f"weights, gradients and activations need {size:,} bytes of shared memory, and {spare_bytes:,} to spare: "
        f"{'; '.join(problems)}. Make it larger (mount -o remount,size=..; docker --shm-size), give a folder on a disk "
        "with room, or use fewer or shorter micro-batches"
    )


def _reserve(folder: Path, size: int) -> tuple[str, int]:
    """Allocate now: a page that cannot be had later is SIGBUS."""
    while True:
        path = folder / f"longrail-store-{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # another job cleared it away before it was locked
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.unlink(path)
        os.close(fd)
        raise
    return str(path), fd


def _clear(folder: Path) -> None:
    """Unlink the files of ranks that were killed before the others had mapped them: nobody holds their lock."""
    for path in [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]:
        with suppress(OSError):  # gone, or another user's
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return (result, None), or (None, why not): the other ranks have to hear of it."""
    try:
        return work(), None
    except (OSError, RuntimeError, PlanError) as error:
        return None, str(error)


def from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Return the value of the group's first rank. Every rank of it calls."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def _from_all(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def exchange_pids(group: dist.ProcessGroup | None) -> list[int]:
    """Return the process of every rank. Every rank of the group calls."""
    return _from_all(os.getpid(), group)


def check_losses(num: int) -> None:
    """Raise PlanError for more micro-batches in one run than there is room for losses."""
    if num > MAX_LOSSES:
        raise PlanError(f"a run of {num} micro-batches; one run takes {MAX_LOSSES} at most, so run fewer steps at once")
