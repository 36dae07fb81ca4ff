"""The ways to save and load that are compared, at their best documented settings.

`save` returns when training may go on, `fence` when parameters may change, `finish` when everything is written;
the caller makes a peer's folder durable afterwards, since none of them does it to the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint_dcp import Dcp, DcpAsync
from benchmarks.checkpoint_state import Work
from benchmarks.checkpoint_way import Blocking, Way
from checkpointing import Checkpointer, KeepLast
from checkpointing.handle import SaveHandle


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


class TorchSave(Blocking):
    """torch.save, a file a rank."""

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        folder.mkdir(exist_ok=True)
        torch.save(self.work.state_dict(), folder / f"{self.rank}.pt")

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        self.copy(torch.load(folder / f"{self.rank}.pt", weights_only=True))


class Safetensors(Blocking):
    """safetensors.torch.save_file, a file a rank."""

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        save_file(self.work.state_dict(), folder / f"{self.rank}.safetensors")

    def load(self, folder: Path, step: int) -> None:
        """Read."""
        from safetensors.torch import load_file

        self.copy(load_file(folder / f"{self.rank}.safetensors"))


class DeepSpeed(Blocking):
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
        self.copy(self.engine.load(str(folder / f"{self.rank}.pt")))


class TorchCheckpointing(Blocking):
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
        """Read into the live tensors."""
        with torch.no_grad():
            self.manager.load(str(folder), {"state": self.work.state_dict()})

    def close(self) -> None:
        """End its process."""
        self.manager.close()


class TorchSnapshot(Blocking):
    """torchsnapshot.Snapshot.async_take; it has copied everything when that returns."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.group: Any = dist.new_group(backend="gloo")
        self.pending: Any = None

    def save(self, folder: Path, step: int) -> None:
        """Copy, and begin to write."""
        from torchsnapshot import Snapshot

        self.pending = Snapshot.async_take(str(folder), {"state": _Stateful(self.work)}, pg=self.group)

    def finish(self) -> None:
        """Wait for the write."""
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
