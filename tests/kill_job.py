"""The small job that `soak_kill` kills: torch only, saves after every step, and writes down what it was told."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from checkpointing import Checkpointer, KeepLast, SaveHandle
from checkpointing.errors import PassedOverError
from launch.env import joined, read_processes

TIMEOUT_S = 20.0


class KillState:
    """A model of some thousand weights with dropout, AdamW, a frozen base, and random data from a saved generator."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(0)
        self.rank, self.step = rank, 0
        self.base = torch.randn(256, 96)
        self.model = torch.nn.Sequential(torch.nn.Linear(96, 200), torch.nn.Tanh(), torch.nn.Linear(200, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.random = torch.Generator().manual_seed(rank)

    def train(self, world_size: int) -> None:
        """One step; the gradients of all ranks are summed in one fixed order."""
        rows = torch.randint(256, (16,), generator=self.random)
        noise = torch.randn(16, 96, generator=self.random)
        self.optimizer.zero_grad()
        (self.model(self.base[rows] + noise) ** 2).mean().backward()
        flat = torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])
        parts = [torch.empty_like(flat) for _ in range(world_size)]
        dist.all_gather(parts, flat)
        total, at = torch.stack(parts).sum(0), 0
        for p in self.model.parameters():
            p.grad = total[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
        self.optimizer.step()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optim.{index}.{slot}": value for slot, value in slots.items()}
        return found | {"base": self.base, f"random.{self.rank}": self.random.get_state(), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.base = state_dict["base"]
        self.random.set_state(state_dict[f"random.{self.rank}"])
        state: dict[int, dict[str, Any]] = {}
        for name, value in state_dict.items():
            if name.startswith("optim."):
                _, index, slot = name.split(".")
                state.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state_dict[f"model.{name}"])

    def digest(self) -> str:
        """A hash of every bit of this rank's state."""
        own = xxhash.xxh3_128()
        for name, value in sorted(self.state_dict().items()):
            own.update(name.encode())
            own.update(
                value.contiguous().view(-1).view(torch.uint8).numpy().data
                if torch.is_tensor(value)
                else repr(value).encode()
            )
        return own.hexdigest()


class Notes:
    """One line a fact, each by one write, in a file that the job's folder knows nothing of."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, event: str, step: int, digest: str = "") -> None:
        os.write(self._fd, f"{json.dumps([event, step, digest, os.getpid()])}\n".encode())


def run(folder: Path, total_steps: int, settings: dict[str, Any]) -> None:
    """This rank's part of the job, from wherever it was to its end."""
    with joined(read_processes(), timeout_s=TIMEOUT_S) as world:
        notes, job = Notes(folder / f"notes-{world.rank}.jsonl"), KillState(world.rank)
        with Checkpointer(folder / "run", keep=KeepLast(2), timeout_s=TIMEOUT_S, **settings) as ckpt:
            info = ckpt.restore(job)
            notes.write("resumed", 0 if info is None else info.step, job.digest())
            before = None
            while job.step < total_steps:
                job.train(world.world_size)
                notes.write("trained", job.step, job.digest())
                handle = ckpt.save(job.step, job)
                note_durable(notes, before)  # one save behind, so that saves run beside steps
                before = handle
            note_durable(notes, before)


def note_durable(notes: Notes, handle: SaveHandle | None) -> None:
    """Wait for a save, and write down that it is durable; not of one that `busy="skip"` left out."""
    with suppress(PassedOverError):
        if handle is not None:
            notes.write("durable", int(handle.wait().name.removeprefix("step-")))
