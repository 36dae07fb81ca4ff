"""Several ranks: slices of DTensors, one policy for all, and a fence that other ranks cannot hold up for ever."""

import json
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from checkpointing import Checkpointer, CheckpointError, Mutability, TensorProvider
from checkpointing.errors import PassedOverError, StateError
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, same
from tests.spawn import run_ranks


def whole_tensors():
    torch.manual_seed(3)
    return {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(4, 6),
        "both": torch.randn(9, 7),
        "copies": torch.randn(3),
        "short": torch.randn(1, 4),
    }


def placements(mesh):
    one = mesh["x"]
    return {
        "rows": (one, [Shard(0)]),
        "columns": (one, [Shard(1)]),
        "both": (mesh, [Shard(0), Shard(1)]),
        "copies": (mesh, [Replicate(), Replicate()]),
        "short": (one, [Shard(0)]),
    }


def save_slices(info, path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    where = placements(mesh)
    state = {name: distribute_tensor(one, *where[name]) for name, one in whole_tensors().items()}
    with Checkpointer(path, timeout_s=20) as ckpt:
        ckpt.save(1, {"run": Flat(state)}).wait()
        partial = DTensor.from_local(torch.ones(2), mesh["x"], [Partial()])
        with pytest.raises(StateError, match=r"'run\.p' is a DTensor with a Partial placement"):
            ckpt.save(2, {"run": Flat({"p": partial})})


def test_slices_tile_the_whole_and_each_is_written_once(tmp_path):
    run_ranks(save_slices, 4, tmp_path)
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "step-1").glob("*.safetensors")}
    boxes: dict[str, list] = {}
    for entry in manifest["tensors"]:
        name = entry["name"].removeprefix("run.")
        whole = whole_tensors()[name]
        assert entry["global_shape"] == list(whole.shape)
        box = tuple(slice(a, a + b) for a, b in zip(entry["offset"], entry["shape"], strict=True))
        assert torch.equal(files[entry["file"]][entry["name"]], whole[box])
        boxes.setdefault(name, []).append(entry["shape"])
    assert {name: len(found) for name, found in boxes.items()} == {
        "rows": 2, "columns": 2, "both": 4, "copies": 1, "short": 1,
    }  # fmt: skip
    with Checkpointer(tmp_path) as ckpt:  # one process, whole tensors
        back = Flat({})
        ckpt.restore({"run": back})
    assert same(back.loaded, whole_tensors())


class Sharded:
    """An FSDP2 model and its optimizer."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(300, 301), torch.nn.BatchNorm1d(301), torch.nn.Linear(301, 300))
        fully_shard(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)

    def step(self):
        self.net(torch.ones(2, 300)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self):
        flat = dict(self.net.state_dict())
        for name, param in self.net.named_parameters():
            flat |= {f"optim.{name}.{slot}": value for slot, value in self.optimizer.state.get(param, {}).items()}
        return flat

    def load_state_dict(self, state):
        raise AssertionError("not loaded here")


def train_sharded(info, path):
    run = Sharded()
    with Checkpointer(path, timeout_s=20) as ckpt:
        run.step()
        expected = {}
        for step in (1, 2, 3):
            ckpt.save(step, {"run": run})
            assert not any("weight" in name for name in ckpt._engine._snapshots._structure.urgent)
            full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in run.state_dict().items()}
            expected[step] = {k: v.clone() for k, v in full.items()}
            run.step()
    return expected


def test_fsdp2_trains_on_while_its_slices_are_saved(tmp_path):
    expected, _ = run_ranks(train_sharded, 2, tmp_path)
    with Checkpointer(tmp_path) as ckpt:
        for step, state in expected.items():
            back = Flat({})
            ckpt.restore({"run": back}, step)
            assert same(back.loaded, state)


def skip_together(info, path):
    """Rank 1 is slow to write: rank 0 is done first, and still all skip."""
    with Checkpointer(path, timeout_s=20, busy="skip") as ckpt, pytest.MonkeyPatch.context() as patch:
        write = LocalStorage.write_at

        def slow(self, *args):
            time.sleep(0.3 * info.rank)
            write(self, *args)

        patch.setattr(LocalStorage, "write_at", slow)
        handles = [ckpt.save(step, Flat({f"w.{info.rank}": torch.ones(100)})) for step in (1, 2, 3)]
        skipped = [handle.skipped is not None for handle in handles]
        for handle in handles[1:]:
            with pytest.raises(PassedOverError):
                handle.wait()
        handles[0].wait()
        dist.barrier()
        if info.rank == 0:
            ckpt._engine.idle(20)
        ckpt.save(4, Flat({f"w.{info.rank}": torch.ones(100)})).wait()
        return skipped, ckpt.steps()


def test_all_ranks_skip_the_same_saves(tmp_path):
    assert run_ranks(skip_together, 2, tmp_path) == [([False, True, True], [1, 4])] * 2


def lose_a_rank(info, path):
    """Rank 1 does not come to the save: rank 0's next step waits for its deadline, goes on, and is told."""
    ckpt = Checkpointer(path, timeout_s=1)
    weight = torch.nn.Parameter(torch.ones(100_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(100_000)
    dist.barrier()
    text, waited = "", 0.0
    if info.rank == 0:
        handle = ckpt.save(1, Flat({"w": TensorProvider(weight.detach(), Mutability.STEP)}))
        begun = time.monotonic()
        optimizer.step()
        waited = time.monotonic() - begun
        with pytest.raises(CheckpointError) as caught:
            ckpt.save(2, Flat({"w": 1}))
        assert handle.is_over
        text = str(caught.value)
    dist.barrier()
    ckpt.close()
    return text, waited < 15, float(weight[0])


def test_a_fence_is_not_held_up_for_ever_by_a_rank_that_is_lost(tmp_path):
    first, _ = run_ranks(lose_a_rank, 2, tmp_path)
    assert first == ("save of step 1 failed: rank 1 did not report in time", True, 0.0)


def plain_slices(info, path):
    """A plain tensor that says which slice of a larger one it is; the other ranks hold the rest."""
    whole = torch.arange(600 * 300.0).reshape(600, 300)
    rows = whole[info.rank * 300 : (info.rank + 1) * 300].clone()
    state = Flat({})
    with Checkpointer(path, timeout_s=20) as ckpt:
        given = TensorProvider(rows, Mutability.STEP, whole=(600, 300), at=(info.rank * 300, 0))
        ckpt.save(1, Flat({"w": given})).wait()
        ckpt.restore(state)
        with pytest.raises(StateError, match=r"'w' is \[300, 300\] at \[301, 0\] of \[600, 300\], which is no slice"):
            ckpt.save(2, Flat({"w": TensorProvider(rows, whole=(600, 300), at=(301, 0))}))
    return same(state.loaded, {"w": whole})


def test_plain_tensors_are_saved_as_slices(tmp_path):
    assert run_ranks(plain_slices, 2, tmp_path) == [True, True]
