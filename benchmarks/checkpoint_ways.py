"""The ways to save and load that are compared, at their best documented settings.

`save` returns when training may go on, `fence` when parameters may change, `finish` when everything is written;
the caller makes a peer's folder durable afterwards, since none of them does it to the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.checkpoint_state import Work
from checkpointing import Checkpointer, KeepLast
from checkpointing.handle import SaveHandle


class Way(Protocol):
    """One way to save a rank's part of a state."""

    def save(self, folder: Path, step: int) -> None:
        """Begin to save, or save, into a folder that is not there yet."""
        ...

    def fence(self) -> None:
        """Return when the state may change."""
        ...

    def finish(self) -> None:
        """Return when everything is written."""
        ...

    def load(self, folder: Path, step: int) -> None:
        """Load into the live state."""
        ...

    def close(self) -> None:
        """End."""
        ...


class Ours:
    """This library. The fence is its own hook on the optimizer; it writes durably by itself."""

    def __init__(self, work: Work, root: Path, **settings: Any) -> None:
        self.work, self.root, self.settings = work, root, settings
        self.checkpointer = Checkpointer(root, keep=settings.pop("keep", KeepLast(1000)), **settings)
        self.handle: SaveHandle | None = None

    def save(self, folder: Path, step: int) -> None:
        """Plan."""
        self.handle = self.checkpointer.save(step, self.work)

    def fence(self) -> None:
        """As the hook does; which then finds nothing left to wait for."""
        self.checkpointer.fence()

    def finish(self) -> None:
        """Wait for the commit."""
        assert self.handle is not None
        self.handle.wait(300)

    def load(self, folder: Path, step: int) -> None:
        """Restore through the same calls that a training job makes."""
        assert self.checkpointer.restore(self.work, step) is not None

    def close(self) -> None:
        """Close."""
        self.checkpointer.close()


class _Blocking:
    """What has written everything when `save` returns."""

    def __init__(self, work: Work) -> None:
        self.work, self.rank = work, dist.get_rank()

    def fence(self) -> None:
        """Nothing is read any more."""

    def finish(self) -> None:
        """Nothing is left."""

    def close(self) -> None:
        """Nothing to end."""

    def _copy(self, loaded: dict[str, torch.Tensor]) -> None:
        self.work.load_state_dict(loaded)


class TorchSave(_Blocking):
    """torch.save, a file a rank."""

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        folder.mkdir(exist_ok=True)
        torch.save(self.work.state_dict(), folder / f"{self.rank}.pt")

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        self._copy(torch.load(folder / f"{self.rank}.pt", weights_only=True))


class Safetensors(_Blocking):
    """safetensors.torch.save_file, a file a rank."""

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        save_file(self.work.state_dict(), folder / f"{self.rank}.safetensors")

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        from safetensors.torch import load_file

        self._copy(load_file(folder / f"{self.rank}.safetensors"))


class DeepSpeed(_Blocking):
    """DeepSpeed's TorchCheckpointEngine with zip serialization; its fast and decoupled engines need libaio."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        self.engine = TorchCheckpointEngine()
        self.engine.zipfile_serialization = True

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        folder.mkdir(exist_ok=True)
        self.engine.save(self.work.state_dict(), str(folder / f"{self.rank}.pt"))

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        self._copy(self.engine.load(str(folder / f"{self.rank}.pt")))


class Dcp(_Blocking):
    """torch.distributed.checkpoint.save with cached plans, a file a rank, two writing threads, fsync of the files."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.group = dist.new_group(backend="gloo")

    def writer(self, folder: Path) -> Any:
        """Return a writer at its best settings."""
        return dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=2)

    def planner(self) -> Any:
        """Return a planner that keeps its plan from save to save."""
        return dcp.DefaultSavePlanner(enable_plan_caching=True)

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        state = self.work.state_dict()
        dcp.save(state, storage_writer=self.writer(folder), planner=self.planner(), process_group=self.group)

    def load(self, folder: Path, step: int) -> None:
        """Read into the live tensors."""
        dcp.load(self.work.state_dict(), storage_reader=dcp.FileSystemReader(folder), process_group=self.group)


class DcpAsync(Dcp):
    """torch.distributed.checkpoint.async_save in one of its forms."""

    def __init__(self, work: Work, kind: str) -> None:
        super().__init__(work)
        from torch.distributed.checkpoint import staging
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.response: Any = None
        process = kind == "process"
        self.type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self.stager: Any = None
        if kind != "thread":
            options = staging.StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=process,
                use_async_staging=kind == "stager",
                use_non_blocking_copy=False,
            )
            self.stager = staging.DefaultStager(options)

    def save(self, folder: Path, step: int) -> None:
        """Stage, or begin to."""
        self.response = dcp.async_save(
            self.work.state_dict(),
            storage_writer=self.writer(folder),
            planner=self.planner(),
            process_group=self.group,
            async_checkpointer_type=self.type,
            async_stager=self.stager,
        )

    def fence(self) -> None:
        """Wait for the staging, where it goes on."""
        staged = getattr(self.response, "staging_completion", None)
        if staged is not None:
            staged.result()

    def finish(self) -> None:
        """Wait for the upload."""
        getattr(self.response, "upload_completion", self.response).result()

    def close(self) -> None:
        """Let go of the stager."""
        if self.stager is not None:
            self.stager.close()


class TorchCheckpointing(_Blocking):
    """torch_checkpointing's manager: staged by a thread into shared memory, written by a process of its own."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)  # its default fails on ext4 here
        self.manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self.future: Any = None

    def save(self, folder: Path, step: int) -> None:
        """Begin to stage."""
        self.future = self.manager.save(str(folder), {"state": self.work.state_dict()})

    def fence(self) -> None:
        """Take the lock that its documentation puts around the optimizer's step."""
        with self.manager.lock():
            pass

    def finish(self) -> None:
        """Wait for the write."""
        self.future.result()

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        loaded = self.manager.load(str(folder), {"state": self.work.state_dict()})
        self._copy(loaded["state"])

    def close(self) -> None:
        """End its process."""
        self.manager.close()


class TorchSnapshot(_Blocking):
    """torchsnapshot.Snapshot.async_take; it has copied everything when that returns."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.group, self.pending = dist.new_group(backend="gloo"), None

    def save(self, folder: Path, step: int) -> None:
        """Copy, and begin to write."""
        from torchsnapshot import Snapshot

        self.pending = Snapshot.async_take(str(folder), {"state": _Stateful(self.work)}, pg=self.group)

    def finish(self) -> None:
        """Wait for the write."""
        assert self.pending is not None
        self.pending.wait()

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        from torchsnapshot import Snapshot

        Snapshot(str(folder), pg=self.group).restore({"state": _Stateful(self.work)})


class _Stateful:
    def __init__(self, work: Work) -> None:
        self.work = work

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors."""
        return {name: tensor.detach() for name, tensor in self.work.tensors.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take them."""
        self.work.load_state_dict(state)


PEERS: dict[str, Callable[[Work], Way]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "DCP": Dcp,
    "DCP thread": lambda work: DcpAsync(work, "thread"),
    "DCP process": lambda work: DcpAsync(work, "process"),
    "DCP DefaultStager": lambda work: DcpAsync(work, "stager"),
    "torch_checkpointing": TorchCheckpointing,
    "torchsnapshot": TorchSnapshot,
    "DeepSpeed": DeepSpeed,
}
NAMES = ("ours", *PEERS)


def open_way(name: str, work: Work, root: Path, **settings: Any) -> Way:
    """Make a way; every rank must."""
    os.makedirs(root, exist_ok=True)
    return Ours(work, root, **settings) if name == "ours" else PEERS[name](work)
