"""A small training job that saves with one library: `python -m tests.chaos_job LIBRARY FOLDER`.

Resumes from the newest checkpoint as that library's users do: the highest number there is, where the library has no
opinion. Says from which step it resumed, and leaves its weights in FOLDER/final.bin.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS, EVERY = 6, 2


def newest(folder: Path, pattern: str) -> tuple[int, Path] | None:
    """The highest number among the names that match."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := re.fullmatch(pattern, path.name))]
    return max(found, default=None)


class TorchSave:
    """torch.save over a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        torch.save(state, self.folder / f"ckpt-{step}.pt")

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        found = newest(self.folder, r"ckpt-(\d+)\.pt")
        return None if found is None else torch.load(found[1])

    def close(self) -> None:
        pass


class Safetensors(TorchSave):
    """safetensors, in one file."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        save_file({name: torch.as_tensor(value) for name, value in state.items()}, self.folder / f"ckpt-{step}.st")

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        from safetensors.torch import load_file

        found = newest(self.folder, r"ckpt-(\d+)\.st")
        return None if found is None else load_file(found[1])


class Dcp(TorchSave):
    """torch.distributed.checkpoint, synchronous."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(state, checkpoint_id=self.folder / f"ckpt-{step}", no_dist=True)

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        import torch.distributed.checkpoint as dcp

        found = newest(self.folder, r"ckpt-(\d+)")
        if found is None:
            return None
        dcp.load(state, checkpoint_id=found[1], no_dist=True)
        return state


class TorchCheckpointing(TorchSave):
    """torch_checkpointing's manager; its own process writes. Without O_DIRECT, which fails on ext4."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.manager.save(str(self.folder / f"ckpt-{step}"), {"state": state}).result()

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        found = newest(self.folder, r"ckpt-(\d+)")
        return None if found is None else self.manager.load(str(found[1]), {"state": state})["state"]

    def close(self) -> None:
        self.manager.close()


class TorchSnapshot(TorchSave):
    """torchsnapshot, synchronous."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        from torchsnapshot import Snapshot, StateDict

        Snapshot.take(str(self.folder / f"ckpt-{step}"), {"state": StateDict(**state)})

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        from torchsnapshot import Snapshot, StateDict

        found = newest(self.folder, r"ckpt-(\d+)")
        if found is None:
            return None
        Snapshot(str(found[1])).restore({"state": (back := StateDict(**state))})
        return dict(back)


class DeepSpeed(TorchSave):
    """DeepSpeed's engine with its own checkpoints, on one rank; it loads what its file `latest` names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: nothing to compile
        deepspeed.init_distributed("gloo", verbose=False)
        model = torch.nn.Module()
        model.register_parameter("weight", torch.nn.Parameter(torch.zeros(50_000)))
        self.engine: Any = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1})[0]

    def save(self, step: int, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.engine.module.weight.copy_(state["weight"])
        self.engine.save_checkpoint(str(self.folder), tag=f"ckpt-{step}", client_state={"step": step})

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        path, client = self.engine.load_checkpoint(str(self.folder))
        if path is None:
            return None
        return {"weight": self.engine.module.weight.detach().clone(), "step": client["step"]}


class Longrail(TorchSave):
    """This library; the folder is searched by it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from checkpointing import SINGLE, Checkpointer, KeepLast

        self.ckpt = Checkpointer(folder, group=SINGLE, keep=KeepLast(9))

    def save(self, step: int, state: dict[str, Any]) -> None:
        from tests.flat_states import Flat

        self.ckpt.save(step, Flat(state)).wait()

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        from tests.flat_states import Flat

        back = Flat({})
        return back.loaded if self.ckpt.restore(back) is not None else None

    def close(self) -> None:
        self.ckpt.close()


LIBRARIES: dict[str, Callable[[Path], TorchSave]] = {
    "longrail": Longrail, "torch.save": TorchSave, "safetensors": Safetensors, "dcp": Dcp,
    "torch_checkpointing": TorchCheckpointing, "torchsnapshot": TorchSnapshot, "deepspeed": DeepSpeed,
}  # fmt: skip


def main(library: str, folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    way = LIBRARIES[library](Path(folder))
    weight = torch.zeros(50_000)
    state: dict[str, Any] = {"weight": weight, "step": torch.tensor(0)}
    loaded = way.load(state)
    if loaded is not None:
        state = {name: torch.as_tensor(value) for name, value in loaded.items()}
    print(f"resumed from step {int(state['step'])}", flush=True)
    while int(state["step"]) < STEPS:
        step = int(state["step"]) + 1
        state = {"weight": state["weight"] * 1.5 + step, "step": torch.tensor(step)}
        if step % EVERY == 0:
            way.save(step, state)
    way.close()
    (Path(folder) / "final.bin").write_bytes(state["weight"].numpy().tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
