"""Incremental saves of shards that change in part, from several ranks, loaded in other shards."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpointing import Checkpointer, KeepLast
from tests.flat_states import Flat, same
from tests.spawn import run_ranks
from tests.test_checkpointing_rows import DATA, restored, table_of


def whole_state(step):
    made = torch.Generator().manual_seed(3)
    tables = {name: torch.randn(2000, 700, generator=made) for name in ("rows", "columns", "both")}
    for tensor in tables.values():
        for past in range(1, step):
            tensor[past * 130 : past * 130 + 20] += past
            tensor[1500 + past] -= past
    return tables


def save_shards(info, path):
    mesh = init_device_mesh("cpu", (info.world_size,))
    with Checkpointer(path, keep=KeepLast(9), incremental=True, timeout_s=30) as ckpt:
        for step in range(1, 5):
            state = whole_state(step)
            state["rows"] = distribute_tensor(state["rows"], mesh, [Shard(0)], src_data_rank=None)
            state["columns"] = distribute_tensor(state["columns"], mesh, [Shard(1)], src_data_rank=None)
            ckpt.save(step, Flat(state)).wait()


def load_shards(info, path):
    mesh = init_device_mesh("cpu", (info.world_size,))
    places = {"rows": [Shard(1)], "columns": [Shard(0)], "both": [Shard(0)]}
    whole = whole_state(4)
    live = {name: distribute_tensor(torch.zeros(2000, 700), mesh, place) for name, place in places.items()}
    with Checkpointer(path) as ckpt:
        back = Flat(live)
        ckpt.restore(back, step=4)
    for name, place in places.items():
        right = distribute_tensor(whole[name], mesh, place, src_data_rank=None)
        assert same(back.loaded[name].to_local().contiguous(), right.to_local().contiguous()), name


def test_shards_that_change_in_part(tmp_path):
    run_ranks(save_shards, 2, tmp_path)
    sizes = [sum(one.stat().st_size for one in (tmp_path / f"step-{step}").glob("rank-?????.safe*")) for step in (1, 4)]
    assert sizes[1] < sizes[0] / 2
    assert {entry["file"] for entry in table_of(tmp_path, 4)} >= {"rank-00001.from-1.safetensors", DATA}
    for step in (1, 2, 3, 4):
        assert same(restored(tmp_path, step), whole_state(step)), step
    run_ranks(load_shards, 3, tmp_path)
