"""Saved on N ranks, loaded on M, in any sharding: by global name and slice, each byte read once."""

import json
import os
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from checkpointing import SINGLE, Checkpointer, CheckpointError
from checkpointing.errors import IntegrityError
from checkpointing.folder import Folder
from checkpointing.load import load_into, load_wants
from checkpointing.manifest import dumps
from checkpointing.pieces import PIECE_BYTES
from checkpointing.records import FileEntry, Manifest, TensorEntry
from checkpointing.reshard import Box, check_cover, plan_load, whole
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, assorted, same
from tests.spawn import run_ranks


def boxes_of(shape, cuts):
    """Cut a shape into a grid of boxes."""
    edges = [sorted({0, size, *(cut for cut in own if 0 < cut < size)}) for size, own in zip(shape, cuts, strict=True)]
    spans = [list(pairwise(one)) for one in edges]
    return [Box(tuple(a for a, _ in one), tuple(b - a for a, b in one)) for one in product(*spans)]


def save_grid(path, tensors, grids):
    """Save tensors in boxes: box k of each goes to file k."""
    place = path / "step-1"
    place.mkdir(parents=True)
    entries, files = [], []
    for rank in range(max(map(len, grids.values()))):
        held = {name: grid[rank] for name, grid in grids.items() if rank < len(grid)}
        parts = {name: tensors[name][box.within(whole(tensors[name].shape))].contiguous() for name, box in held.items()}
        data = safetensors_bytes(parts)
        head = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:head])
        file = f"rank-{rank:05d}.safetensors"
        for name, box in held.items():
            begin, end = (head + at for at in header[name]["data_offsets"])
            hashes = (xxhash.xxh3_64_hexdigest(data[begin:end]),) if end > begin else ()
            shape = tuple(tensors[name].shape)
            entries.append(
                TensorEntry(name, header[name]["dtype"], shape, box.offset, box.shape, file, begin, end, hashes)
            )
        files.append(FileEntry(file, len(data), head, xxhash.xxh3_64_hexdigest(data[:head])))
        (place / file).write_bytes(data)
    entries.sort(key=lambda entry: (entry.name, entry.offset))
    manifest = Manifest("ab" * 16, 1, len(files), PIECE_BYTES, tuple(files), tuple(entries), {}, {}, {"note": 1})
    (place / "manifest.json").write_bytes(dumps(manifest))
    return Folder(path, LocalStorage())


cuts = st.lists(st.integers(1, 8), max_size=3)


@given(st.data(), st.lists(st.integers(1, 8), min_size=0, max_size=3))
def test_any_box_of_any_grid_is_put_together(tmp_path_factory, data, shape):
    path = tmp_path_factory.mktemp("grid")
    tensor = torch.randn(shape)
    grid = boxes_of(shape, [data.draw(cuts) for _ in shape])
    folder = save_grid(path, {"w": tensor}, {"w": grid})
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    want = Box(offset, tuple(data.draw(st.integers(1, size - at)) for size, at in zip(shape, offset, strict=True)))
    got = load_wants(folder, folder.inspect(1), {"w": want})["w"]
    assert same(got, tensor[want.within(whole(shape))].contiguous())


@given(st.integers(1, 4), st.data())
def test_a_plan_reads_every_needed_byte_once_and_none_else(world_size, data):
    shape = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    grid = boxes_of(shape, [data.draw(cuts), data.draw(cuts)])
    entries = tuple(
        TensorEntry(
            "w", "F32", shape, box.offset, box.shape, "rank-00000.safetensors", 100 * n, 100 * n + 4 * box.size, ()
        )
        for n, box in enumerate(grid)
    )
    manifest = Manifest("ab" * 16, 1, 1, PIECE_BYTES, (), entries, {}, {}, {})
    targets = boxes_of(shape, [data.draw(cuts), []])
    wants = [{"w": targets[rank]} if rank < len(targets) else {} for rank in range(world_size)]
    plan = plan_load(manifest, wants)
    needed = {e for e in entries for w in wants if w and Box(e.offset, e.shape).overlap(w["w"])}
    read = [(task, entry) for task in plan.tasks for entry in task.entries]
    assert sorted(entry.begin for _, entry in read) == sorted(entry.begin for entry in needed)
    for task, entry in read:
        assert task.reader in task.takers
        assert task.takers == tuple(
            rank for rank, want in enumerate(wants) if want and Box(entry.offset, entry.shape).overlap(want["w"])
        )


def test_what_was_not_saved_is_named():
    entry = TensorEntry("w", "F32", (4, 4), (0, 0), (2, 4), "rank-00000.safetensors", 8, 40, ())
    with pytest.raises(IntegrityError, match=r"tensor 'w': 8 of the 16 elements at \[0, 0\]\+\[4, 4\] were saved"):
        check_cover("w", [entry], whole((4, 4)))


def save_and_load(info, path):
    """Rank by rank reads are counted at the storage: together they are the bytes of the checkpoint, once."""
    state = assorted(5) | {f"own.{info.rank}": torch.full((100,), float(info.rank))}
    with Checkpointer(path) as ckpt:
        ckpt.save(1, Flat(state)).wait()
        counted = 0
        into, vectors = LocalStorage.read_into, LocalStorage.read_vectors

        def read_into(self, fd, data, offset):
            nonlocal counted
            counted += len(data) * (".safetensors" in os.readlink(f"/proc/self/fd/{fd}"))
            return into(self, fd, data, offset)

        def read_vectors(self, fd, parts, offset):
            nonlocal counted
            counted += sum(map(len, parts))
            return vectors(self, fd, parts, offset)

        LocalStorage.read_into, LocalStorage.read_vectors = read_into, read_vectors
        try:
            back = Flat({})
            ckpt.restore(back)
        finally:
            LocalStorage.read_into, LocalStorage.read_vectors = into, vectors
    expected = assorted(5) | {f"own.{rank}": torch.full((100,), float(rank)) for rank in range(info.world_size)}
    return counted, same(back.loaded, expected)


def test_every_byte_is_read_once_per_job(tmp_path):
    results = run_ranks(save_and_load, 3, tmp_path)
    assert all(right for _, right in results)
    files = list((tmp_path / "step-1").glob("*.safetensors"))
    assert sum(count for count, _ in results) <= sum(file.stat().st_size for file in files)
    assert all(count > 0 for count, _ in results)


class Stage(Flat):
    """Computes with what it gives out, and with nothing else."""

    restores_own_names = True


def load_stage(info, path):
    """Each rank saves a layer with moments and a shared norm; a fresh one of the same layer has no moments yet."""
    mine, other = (torch.full((9,), float(rank)) for rank in (info.rank, 1 - info.rank))
    layer, slot, norm = f"model.{info.rank}.w", f"optim.{info.rank}.w.m", torch.ones(4)
    with Checkpointer(path) as ckpt:
        ckpt.save(1, Flat({layer: mine, slot: mine + 5, "model.norm": norm, "epoch": 3})).wait()
        stage, plain = Stage({layer: torch.zeros(9), "model.norm": torch.zeros(4)}), Flat({layer: torch.zeros(9)})
        ckpt.restore(stage)
        ckpt.restore(plain)
    own = {layer: mine, "model.norm": norm, "epoch": 3}
    rest = {f"model.{1 - info.rank}.w": other, f"optim.{1 - info.rank}.w.m": other + 5}
    return stage.loaded.keys() - own.keys(), same(plain.loaded, own | rest | {slot: mine + 5}), slot


def test_a_stage_is_brought_its_own_names_and_others_every_name(tmp_path):
    for extra, plain_has_all, slot in run_ranks(load_stage, 2, tmp_path):
        assert extra == {slot}  # the moments come to where their parameter is
        assert plain_has_all


def reference():
    torch.manual_seed(11)
    return {"w": torch.randn(7, 6), "b": torch.randn(5), "tall": torch.randn(9, 2), "plain": torch.randn(3)}


def load_sharded(info, path, layout):
    """Load what a grid holds as DTensors on `layout`, and compare the shards with the reference."""
    tensors = reference()
    if layout == "rows":
        mesh, places = init_device_mesh("cpu", (info.world_size,)), {n: [Shard(0)] for n in ("w", "b", "tall")}
    elif layout == "columns":
        mesh = init_device_mesh("cpu", (info.world_size,))
        places = {"w": [Shard(1)], "b": [Replicate()], "tall": [Shard(1)]}
    else:
        mesh = init_device_mesh("cpu", (2, 2))
        places = {"w": [Shard(0), Shard(1)], "b": [Replicate(), Shard(0)], "tall": [Shard(1), Shard(0)]}
    live = {n: distribute_tensor(torch.zeros_like(tensors[n]), mesh, place) for n, place in places.items()}
    with Checkpointer(path) as ckpt:
        back = Flat(live | {"plain": torch.zeros(3)})
        ckpt.restore(back)
    for name, value in live.items():
        got = back.loaded[name]
        assert isinstance(got, DTensor), name
        assert got.placements == value.placements
        right = distribute_tensor(tensors[name], mesh, places[name]).to_local()
        assert same(got.to_local().contiguous(), right.contiguous()), name
    assert same(back.loaded["plain"], tensors["plain"])
    return back.loaded["note"]


@pytest.mark.parametrize(("world_size", "layout"), [(3, "rows"), (2, "columns"), (4, "grid")])
def test_saved_in_any_grid_and_loaded_in_any_sharding(tmp_path, world_size, layout):
    tensors = reference()
    grids = {
        "w": boxes_of((7, 6), [[2, 5], [3]]),
        "b": boxes_of((5,), [[1, 2]]),
        "tall": boxes_of((9, 2), [[4], [1]]),
        "plain": boxes_of((3,), [[]]),
    }
    save_grid(tmp_path, tensors, grids)
    assert run_ranks(load_sharded, world_size, tmp_path, layout) == [1] * world_size


def load_fsdp(info, path):
    """The parameters of an FSDP2 model and its optimizer state that does not exist yet."""
    model = torch.nn.Linear(6, 7, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (info.world_size,)))
    with Checkpointer(path) as ckpt:
        back = Flat({"model.weight": model.weight})
        ckpt.restore(back)
    moment = back.loaded["optim.weight.exp_avg"]
    assert isinstance(moment, DTensor)
    assert moment.to_local().shape == model.weight.to_local().shape
    assert back.loaded["optim.weight.step"].shape == ()
    return same(moment.full_tensor(), reference()["w"] * 2)


def test_optimizer_state_is_sharded_like_its_parameter(tmp_path):
    w = reference()["w"]
    tensors = {"model.weight": w, "optim.weight.exp_avg": w * 2, "optim.weight.step": torch.tensor(3.0)}
    grids = {name: boxes_of(t.shape, [[] for _ in t.shape]) for name, t in tensors.items()}
    save_grid(tmp_path, tensors, grids)
    assert run_ranks(load_fsdp, 3, tmp_path) == [True] * 3


def load_other_shape(info, path):
    mesh = init_device_mesh("cpu", (info.world_size,))
    live = distribute_tensor(torch.zeros(8, 6), mesh, [Shard(0)])
    back = Flat({"w": live})
    with Checkpointer(path) as ckpt:
        try:
            ckpt.restore(back)
        except CheckpointError as error:
            return str(error), back.loaded
    return None


def test_a_live_shard_of_another_shape_is_an_error_on_every_rank(tmp_path):
    save_grid(tmp_path, {"w": reference()["w"]}, {"w": boxes_of((7, 6), [[], []])})
    for text, loaded in run_ranks(load_other_shape, 2, tmp_path):
        assert "'w' was saved as [7, 6] and is [8, 6] now" in text
        assert loaded is None


def fall_back(info, path):
    with Checkpointer(path) as ckpt:
        back = Flat({})
        found = ckpt.restore(back)
        dist.barrier()
    return found.step, [reason for _, reason in found.skipped], same(back.loaded, assorted(1))


@pytest.mark.parametrize("newer", [1, 2])  # 1: the two checkpoints differ in their step only
def test_a_damage_one_rank_finds_makes_all_ranks_fall_back(tmp_path, newer):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(1, Flat(assorted(1))).wait()
        ckpt.save(2, Flat(assorted(newer))).wait()
    file = tmp_path / "step-2" / "rank-00000.safetensors"
    body = json.loads((file.parent / "manifest.json").read_text())
    for name in ("odd", "weight", "page"):
        entry = next(one for one in body["tensors"] if one["name"] in (name, "head.weight"))
        data = bytearray(file.read_bytes())
        data[entry["begin"]] ^= 8
        file.write_bytes(data)
    results = run_ranks(fall_back, 2, tmp_path)
    assert results[0] == results[1]
    step, reasons, right = results[0]
    assert (step, right) == (1, True)
    assert "is not what was saved (read by rank" in reasons[0]
    assert [path.name.split("-")[1] for path in tmp_path.glob("step-2.bad-*")] == ["2.bad"]


def test_load_into_fills_the_given_tensors(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(1, Flat(assorted(1))).wait()
    expected = {name: one for name, one in assorted(1).items() if torch.is_tensor(one)}
    into = {name: torch.zeros(one.shape, dtype=one.dtype) for name, one in expected.items()}
    folder = Folder(tmp_path, LocalStorage())
    load_into(folder, 1, into)
    assert same(into, {name: one.contiguous() for name, one in expected.items()})
    with pytest.raises(IntegrityError, match=r"'page' is not saved as one torch\.float32 of shape \[1023\]"):
        load_into(folder, 1, {"page": torch.zeros(1023)})
