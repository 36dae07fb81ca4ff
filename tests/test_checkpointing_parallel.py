"""Saved under one kind of parallelism and loaded under another, optimizer state included, by parameter name.

AdamW works element by element, and gradients here are a function of name and step: after any save, load and step in
any layout the parameters are those of one process that trained all along, bit by bit.
"""

from __future__ import annotations

import zlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from checkpointing import Checkpointer
from tests.spawn import run_ranks

SAVED_AFTER = 2
LAYOUTS = ("ddp", "fsdp", "tp", "ep", "pp", "fsdp+tp")


class Net(nn.Module):
    """Two layers, experts, and a weight that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(150, 160), nn.Linear(160, 150)
        self.experts = nn.Parameter(torch.randn(4, 90, 80))
        self.register_buffer("seen", torch.zeros(3))
        self.head = nn.Linear(150, 160)
        self.head.weight = self.up.weight


class Run:
    """A model in a layout with its AdamW, as one flat state."""

    def __init__(self, layout: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.net, self.owned = parallel(Net(), layout)
        self.params = {name: p for name, p in self.net.named_parameters() if self.owned(name)}
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.1)
        self.steps = 0

    def train(self) -> None:
        self.steps += 1
        for name, p in self.params.items():
            chance = torch.Generator().manual_seed(zlib.crc32(f"{name} {self.steps}".encode()))
            grad = torch.randn(p.shape, generator=chance)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        self.optimizer.step()
        self.net.seen.fill_(self.steps)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {f"model.{name}": one for name, one in self.net.state_dict().items() if self.owned(name)}
        for name, p in self.params.items():
            flat |= {f"optim.{name}.{slot}": value for slot, value in self.optimizer.state.get(p, {}).items()}
        return flat | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        with torch.no_grad():
            for name, one in self.net.state_dict().items():
                if self.owned(name):
                    one.copy_(state_dict[f"model.{name}"])
        for name, p in self.params.items():
            for slot in ("step", "exp_avg", "exp_avg_sq"):
                self.optimizer.state[p][slot] = state_dict[f"optim.{name}.{slot}"]


def parallel(net: Net, layout: str) -> tuple[Any, Any]:
    """Return the model in a layout, and which of its names this rank has."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if layout == "ddp":
        return DistributedDataParallel(net).module, bool
    if layout == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    elif layout == "tp":
        mesh = init_device_mesh("cpu", (size,))
        parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        net.head.weight = net.up.weight
    elif layout == "fsdp+tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        net.head.weight = net.up.weight
        net.experts = nn.Parameter(distribute_tensor(net.experts.detach(), mesh["tp"], [Replicate()]))
        fully_shard(net, mesh=mesh["dp"])
    elif layout == "ep":
        mesh = init_device_mesh("cpu", (size,))
        net.experts = nn.Parameter(distribute_tensor(net.experts.detach(), mesh, [Shard(0)]))
    elif layout == "pp":
        first = ("up.", "experts", "seen", "head.weight")  # a tied weight has one owner
        return net, lambda name: name.startswith(first) == (rank == 0)
    return net, bool


def whole(run: Run) -> dict[str, torch.Tensor]:
    """What this rank has of the model, in full."""
    found = {name: one for name, one in run.net.state_dict().items() if run.owned(name)}
    return {
        name: one.full_tensor() if isinstance(one, DTensor) else one.detach().clone() for name, one in found.items()
    }


def oracle(steps: int) -> dict[str, torch.Tensor]:
    run = Run("plain", seed=0)
    for _ in range(steps):
        run.train()
    return whole(run)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """The names that differ."""
    return [name for name, one in found.items() if not torch.equal(one, wanted[name])]


def rank_saves(info: Any, root: str, layouts: tuple[str, ...]) -> None:
    for layout in layouts:
        run = Run(layout, seed=0)
        with Checkpointer(Path(root) / f"{layout}-{info.world_size}", timeout_s=30) as ckpt:
            for _ in range(SAVED_AFTER):
                run.train()
            ckpt.save(SAVED_AFTER, {"run": run})
            run.train()  # behind the fence


def rank_loads(info: Any, root: str, layouts: tuple[str, ...]) -> list[str]:
    wrong = []
    sources = sorted(path for path in Path(root).iterdir())
    before, after = oracle(SAVED_AFTER), oracle(SAVED_AFTER + 1)
    for source, layout in product(sources, layouts):
        run = Run(layout, seed=5)
        with Checkpointer(source, timeout_s=30) as ckpt:
            restored = ckpt.restore({"run": run})
            assert restored is not None
            assert restored.step == run.steps == SAVED_AFTER
        wrong += [f"{source.name} as {layout}: {name} as loaded" for name in equal(whole(run), before)]
        run.train()
        wrong += [f"{source.name} as {layout}: {name} a step later" for name in equal(whole(run), after)]
    return wrong


@pytest.mark.timeout(180)
def test_any_layout_loads_what_any_other_saved(tmp_path):
    run_ranks(rank_saves, 2, str(tmp_path), LAYOUTS, timeout_s=100)
    run_ranks(rank_saves, 1, str(tmp_path), ("plain",))
    run_ranks(rank_saves, 3, str(tmp_path), ("fsdp",))
    run_ranks(rank_saves, 4, str(tmp_path), ("fsdp+tp",))
    assert len(list(tmp_path.iterdir())) == len(LAYOUTS) + 3
    assert run_ranks(rank_loads, 1, str(tmp_path), ("plain",), timeout_s=100) == [[]]
    assert run_ranks(rank_loads, 2, str(tmp_path), LAYOUTS, timeout_s=100) == [[], []]
    assert run_ranks(rank_loads, 3, str(tmp_path), ("fsdp", "ep"), timeout_s=100) == [[], [], []]
    assert run_ranks(rank_loads, 4, str(tmp_path), ("fsdp+tp",), timeout_s=100) == [[], [], [], []]
