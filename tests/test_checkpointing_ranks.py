"""Several ranks: one checkpoint, one verdict."""

import base64
import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from checkpointing import SINGLE, Checkpointer, CheckpointError
from tests.flat_states import Flat, assorted, same
from tests.spawn import run_ranks


def replicated_and_own(rank: int) -> dict:
    own = {f"rng.{rank}": torch.full((3,), rank), f"note.{rank}": f"of rank {rank}"}
    return assorted(5) | own


def save_and_restore(info, path):
    with Checkpointer(path) as ckpt:
        assert ckpt.restore({"run": Flat({})}) is None
        place = ckpt.save(3, {"run": Flat(replicated_and_own(info.rank))}).wait()
        back = Flat({})
        found = ckpt.restore({"run": back})
    assert found is not None
    assert found.path == place
    return same(back.loaded, replicated_and_own(0) | replicated_and_own(1)), ckpt.steps()


def test_two_ranks_round_trip_and_replicas_are_written_once(tmp_path):
    assert run_ranks(save_and_restore, 2, tmp_path) == [(True, [3]), (True, [3])]
    files = [load_file(tmp_path / "step-3" / f"rank-0000{rank}.safetensors") for rank in (0, 1)]
    assert not files[0].keys() & files[1].keys()
    assert "run.rng.0" in files[0]
    assert "run.rng.1" in files[1]
    sizes = [sum(t.numel() * t.element_size() for t in file.values()) for file in files]
    assert abs(sizes[0] - sizes[1]) <= 4096  # the largest tensor
    manifest = json.loads((tmp_path / "step-3" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


def save_once(info, path, step):
    with Checkpointer(path) as ckpt:
        ckpt.save(step, {"run": Flat(replicated_and_own(info.rank))}).wait()


def restore_once(info, path):
    with Checkpointer(path) as ckpt:
        back = Flat({})
        found = ckpt.restore({"run": back})
        if found is None:
            return None
        return found.step, [reason for _, reason in found.skipped], same(back.loaded, both())


def both():
    return replicated_and_own(0) | replicated_and_own(1)


def test_saved_on_two_and_restored_on_one_and_on_three(tmp_path):
    run_ranks(save_once, 2, tmp_path, 1)
    with Checkpointer(tmp_path) as ckpt:  # no group here: one process
        back = Flat({})
        assert ckpt.restore({"run": back}) is not None
    assert same(back.loaded, both())
    assert run_ranks(restore_once, 3, tmp_path) == [(1, [], True)] * 3


def test_saved_on_one_and_restored_on_two(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(1, {"run": Flat(both())}).wait()
    assert run_ranks(restore_once, 2, tmp_path) == [(1, [], True)] * 2


def test_every_rank_falls_back_to_the_same_older_one(tmp_path):
    run_ranks(save_once, 2, tmp_path, 1)
    run_ranks(save_once, 2, tmp_path, 2)
    file = tmp_path / "step-2" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    first, second = run_ranks(restore_once, 2, tmp_path)
    assert first == second
    assert first[0] == 1
    assert "step-2/rank-00001.safetensors: tensor 'run." in first[1][0]


def in_a_subgroup(info, path):
    group = dist.new_group([1, 2])
    if info.rank == 0:
        with pytest.raises(CheckpointError, match="not in the group"):
            Checkpointer(path, group=dist.group.WORLD if group is None else group)
        return None
    with Checkpointer(path, group=group) as ckpt:
        ckpt.save(1, Flat({f"own.{info.rank}": 1})).wait()
        return ckpt.steps()


def test_a_group_that_is_not_the_world(tmp_path):
    assert run_ranks(in_a_subgroup, 3, tmp_path) == [None, [1], [1]]
    names = sorted(path.name for path in (tmp_path / "step-1").iterdir())
    assert names == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]


def much_to_say(info, path):
    """Reports of more than 8 MiB, which is more than a TCPStore takes at once."""
    noise = base64.b64encode(os.urandom(9 * 2**20)).decode()
    with Checkpointer(path, timeout_s=30) as ckpt:
        ckpt.save(1, Flat({f"noise.{info.rank}": noise})).wait()
        return ckpt.steps()


def test_large_reports_pass(tmp_path):
    assert run_ranks(much_to_say, 2, tmp_path) == [[1], [1]]
    assert (tmp_path / "step-1" / "manifest.json").stat().st_size > 2 * 9 * 2**20
