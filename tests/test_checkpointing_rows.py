"""Incremental saves of tensors that change in part: what is written, what it loads as, and what is kept for it."""

import json
import os
import random

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, KeepLast, Mutability, TensorProvider, incremental
from checkpointing.folder import Folder
from checkpointing.formats import open_source
from checkpointing.incremental import MAX_FILES, MAX_REFERENCES, MIN_RUN_BYTES
from checkpointing.load import load_into
from checkpointing.storage.local import LocalStorage
from tests.checkpoint_commands import run, run_json
from tests.flat_states import Flat, same
from tests.test_checkpointing_corruption import first_damage, write_through

DATA = "rank-00000.safetensors"
PIECE = 4 * 2**20
ENTRIES = 2 * MAX_REFERENCES + 1


def opened(path, **settings):
    return Checkpointer(path, group=SINGLE, **{"keep": KeepLast(9), "incremental": True, "timeout_s": 30, **settings})


def save(ckpt, step, state):
    """Save, and return how many bytes were written."""
    path = ckpt.save(step, Flat(state)).wait()
    assert ckpt._engine.idle(20)
    written = (path / DATA).stat()
    assert written.st_blocks * 512 <= written.st_size + 64 * 2**10  # nothing is reserved for what is not written
    return written.st_size


def restored(path, step=None, **live):
    with Checkpointer(path, group=SINGLE) as ckpt:
        back = Flat(live)
        ckpt.restore(back, step=step)
    return back.loaded


def table_of(path, step):
    return json.loads((path / f"step-{step}" / "manifest.json").read_text())["tensors"]


def links(path, step):
    return {one.name for one in (path / f"step-{step}").glob("*.from-*")}


def test_only_what_changed_is_written_and_all_of_it_loads(tmp_path):
    table = torch.randn(4096, 512)  # 8 MiB, rows of 2 KiB
    copies = {}
    with opened(tmp_path) as ckpt:
        sizes = []
        for step, rows in enumerate((slice(0, 0), slice(3000, 3041), slice(3010, 3020), slice(0, 4096)), 1):
            table[rows] += 1
            copies[step] = table.clone()
            sizes.append(save(ckpt, step, {"table": table, "step": step}))
    assert sizes[0] > table.nbytes
    assert sizes[1] <= PIECE + 2**14  # which rows of a piece changed is not known yet
    assert sizes[2] <= 2 * 64 * 2**10 + 2**14
    assert sizes[3] == sizes[0]  # all of it changed, and it is one piece again
    assert (len(table_of(tmp_path, 1)), len(table_of(tmp_path, 4))) == (1, 1)
    assert links(tmp_path, 3) == {"rank-00000.from-1.safetensors", "rank-00000.from-2.safetensors"}
    for step, copy in copies.items():
        assert same(restored(tmp_path, step), {"table": copy, "step": step})
    live = torch.zeros_like(table)
    assert restored(tmp_path, 3, table=live)["table"].data_ptr() == live.data_ptr()  # where it lies, in all its rows
    assert same(live, copies[3])
    load_into(Folder(tmp_path, LocalStorage()), 3, {"table": live.zero_()})
    assert same(live, copies[3])
    assert same(open_source(tmp_path / "step-3").tensors["table"].read(), copies[3])


def test_the_command_reads_rows_of_several_files(tmp_path):
    table, other = torch.randn(12_000, 256), torch.zeros(5)
    with opened(tmp_path / "run") as ckpt:
        for step in (1, 2, 3):
            table[5000:5020] += 1
            save(ckpt, step, {"model.table": table, "model.other": other})
    shards = run_json("show", tmp_path / "run")["tensors"][1]["shards"]
    assert len(shards) == len(table_of(tmp_path / "run", 3)) - 1 > 2
    assert run("show", tmp_path / "run")
    assert run("verify", tmp_path / "run")[0] == 0
    assert run("doctor", tmp_path / "run")[0] == 0
    found = run_json("diff", tmp_path / "run@2", tmp_path / "run@3", ok=(1,))
    assert [(one["name"], one["different"]) for one in found] == [("model.table", 20 * 256)]
    run("restore", tmp_path / "run", tmp_path / "a.pt", "--format", "torch", "--only", "*table", "--dtype", "bfloat16")
    made = torch.load(tmp_path / "a.pt")
    assert {name: tensor.dtype for name, tensor in made.items()} == {"model.table": torch.bfloat16}
    assert torch.equal(made["model.table"], table.bfloat16())
    run("restore", tmp_path / "run", tmp_path / "dcp", "--format", "dcp", "--world-size", "2")
    assert same(open_source(tmp_path / "dcp").tensors["model.table"].read(), table)
    run("prune", tmp_path / "run", "--keep", "1")
    assert same(restored(tmp_path / "run"), {"model.table": table, "model.other": other})


def test_tensors_of_every_kind(tmp_path):
    experts = torch.randn(3, 1_200_000)  # a row is larger than a piece
    kinds = {
        "experts": experts,
        "odd": torch.randn(3001, 333).bfloat16(),
        "wide": torch.randn(1, 1, 700_001),
        "complex": torch.randn(300, 500, dtype=torch.complex64),
        "bytes": torch.randint(0, 255, (1_000_003,), dtype=torch.uint8),
        "turned": torch.randn(400, 900).t(),
        "middling": torch.randn(20_000),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 700),
        "table[0:8]": torch.randn(70_000),
        "table": torch.randn(800, 300),
        "flags": torch.rand(900_000) > 0.5,
    }
    state = {**kinds, "tied": kinds["odd"], "conj": kinds["complex"].conj()}
    with opened(tmp_path) as ckpt:
        copies, sizes = {}, []
        for step in range(1, 6):
            sizes.append(save(ckpt, step, state))
            copies[step] = {name: tensor.clone() for name, tensor in state.items()}
            experts[1] += 1
            for name in ("odd", "bytes", "wide", "turned", "complex"):
                flat = kinds[name].view(-1) if kinds[name].is_contiguous() else kinds[name][0]
                flat[step * 7 : step * 7 + 40] = 0
            kinds["table"][0:8] += 1
            kinds["scalar"] += 1
    assert sizes[3] < experts[0].nbytes + kinds["turned"].nbytes + 3 * 2**20
    names = [(entry["name"], entry["offset"], entry["shape"], entry["file"]) for entry in table_of(tmp_path, 4)]
    assert [entry for entry in names if entry[0] == "experts" and entry[3] == DATA] == [
        ("experts", [1, 0], [1, 1_200_000], DATA)
    ]
    assert any(entry[0] == "wide" and entry[1][2] > 0 for entry in names)
    for step, copy in copies.items():
        back = restored(tmp_path, step)
        assert same({name: back[name].clone() for name in back}, copy), step


def test_another_shape_or_dtype_is_written_anew(tmp_path):
    base = torch.randn(1000, 300)
    states = [base, base, base[:900].clone(), base[:900].double(), base[:900].reshape(300, 900), base.bfloat16(), base]
    with opened(tmp_path) as ckpt:
        sizes = [save(ckpt, step, {"w": tensor}) for step, tensor in enumerate(states)]
    assert all(size > tensor.nbytes for size, tensor in zip(sizes[2:], states[2:], strict=True))
    assert sizes[1] < 2**14
    for step, tensor in enumerate(states):
        assert same(restored(tmp_path, step), {"w": tensor}), step


@pytest.mark.parametrize("seed", range(3))
def test_a_long_chain_loses_nothing_and_keeps_nothing_else(tmp_path, seed):
    """Rows change at random and checkpoints in the middle go: all that stays is right, and all files are needed."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    tables = {"a": torch.randn(3000, 257), "b": torch.randn(40, 20_000).half(), "c": torch.zeros(700_000)}
    dense, copies = torch.randn(50_000 * seed + 10), {}
    with opened(tmp_path, keep=KeepLast(3)) as ckpt:
        for step in range(1, 15):
            for tensor in tables.values():
                for _ in range(chance.choice((0, 0, 1, 2, 30))):
                    at = chance.randrange(len(tensor))
                    tensor[at : at + chance.choice((1, 2, len(tensor) // 10))] += 1
            dense += 1
            state = {**tables, "dense": dense}
            save(ckpt, step, state)
            copies[step] = {name: tensor.clone() for name, tensor in state.items()}
    folder = Folder(tmp_path, LocalStorage())
    assert [*folder.committed()] == [12, 13, 14]
    inodes = [(one.stat().st_ino, one.stat().st_nlink) for one in tmp_path.glob("step-*/*.safetensors")]
    assert all(links == [inode for inode, _ in inodes].count(inode) for inode, links in inodes)
    for step in (12, 13, 14):
        manifest = folder.inspect(step)
        assert {entry.file for entry in manifest.tensors} == {file.path for file in manifest.files}
        assert len(manifest.files) <= MAX_FILES + 1
        for name in tables:
            assert sum(entry.name == name for entry in manifest.tensors) <= ENTRIES
        for file in manifest.files:
            used = sum(entry.end - entry.begin for entry in manifest.tensors if entry.file == file.path)
            assert used >= file.length / 8
        assert first_damage(folder, step) is None
        assert same(restored(tmp_path, step), copies[step])


def test_many_scattered_rows_make_no_more_entries_than_allowed(tmp_path):
    table = torch.zeros(40_000, 256)  # 40 MB
    with opened(tmp_path) as ckpt:
        for step in range(1, 5):
            sizes = save(ckpt, step, {"table": table})
            copy = table.clone()
            table[step * 7 :: 300] += 1
    assert sizes < 0.6 * table.nbytes
    entries = table_of(tmp_path, 4)
    assert 20 < len(entries) <= ENTRIES
    assert sum(entry["end"] - entry["begin"] < MIN_RUN_BYTES for entry in entries if entry["file"] != DATA) == 0
    assert same(restored(tmp_path), {"table": copy})


def test_a_state_that_changes_all_over_is_hashed_once(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(incremental, "equal_spans", lambda view, marks: looked.append(len(view)))
    state = {"a": torch.randn(300, 1000), "b": torch.randn(100_000).bfloat16()}
    with opened(tmp_path) as ckpt:
        for step in range(4):
            save(ckpt, step, state)
            for tensor in state.values():
                tensor.mul_(2)
    assert not looked


def test_memory_that_changes_behind_the_engines_back_is_not_referred_to(tmp_path, monkeypatch):
    """Between two looks at it, that is: then it is written."""
    table, real = torch.randn(4000, 513), incremental.equal_spans

    def changes(view, marks):
        found = real(view, marks)
        table.fill_(7.0)
        return found

    with opened(tmp_path) as ckpt:
        provider = TensorProvider(table, Mutability.NEVER)
        save(ckpt, 1, {"table": provider})
        table[3000] += 1  # the second piece differs, and what is right before it ends within a piece
        monkeypatch.setattr(incremental, "equal_spans", changes)
        assert save(ckpt, 2, {"table": provider}) > table.nbytes
    assert same(restored(tmp_path)["table"], torch.full((4000, 513), 7.0))


def test_a_step_that_is_saved_again_after_going_back(tmp_path):
    table = torch.randn(2000, 512)
    with opened(tmp_path) as ckpt:
        for step in (1, 2, 3):
            table[20:30] += 1
            save(ckpt, step, {"table": table})
        ckpt.restore(Flat({"table": table}), step=1)
        copies = {}
        for step in (2, 3, 4, 5):
            table[500 * step - 1000 : 500 * step - 700] += 2
            save(ckpt, step, {"table": table})
            copies[step] = table.clone()
    assert any("from-2-2" in name or "from-3-2" in name for name in links(tmp_path, 4) | links(tmp_path, 5))
    for step, copy in copies.items():
        assert same(restored(tmp_path, step), {"table": copy}), step


def test_damage_in_an_older_file_is_found_named_and_gone_around(tmp_path):
    table = torch.randn(3000, 512)
    first = table.clone()
    with opened(tmp_path) as ckpt:
        for step in (1, 2, 3):
            table[(step - 1) * 1000 : (step - 1) * 1000 + 200] += step - 1
            save(ckpt, step, {"table": table})
    folder = Folder(tmp_path, LocalStorage())
    (entry, *_) = [one for one in folder.inspect(3).tensors if one.file == "rank-00000.from-2.safetensors"]
    path = folder.at(3) / entry.file
    assert os.path.samefile(path, folder.at(2) / DATA)
    good = path.read_bytes()
    write_through(path, good[: entry.end - 1] + bytes([good[entry.end - 1] ^ 1]) + good[entry.end :])
    damage = first_damage(folder, 3)
    assert (damage.file, damage.tensor) == ("step-3/rank-00000.from-2.safetensors", "table")
    assert damage.piece == len(entry.hashes) - 1
    text = run("verify", tmp_path, ok=(1,))[1]
    assert "step-3/rank-00000.from-2.safetensors: tensor 'table', piece" in text
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        back = Flat({})
        info = ckpt.restore(back)
    assert (info.step, len(info.skipped)) == (1, 2)
    assert "tensor 'table', piece" in info.skipped[0][1]
    assert same(back.loaded, {"table": first})


def test_the_second_tier_has_what_older_files_hold(tmp_path):
    table = torch.randn(6000, 512)
    with opened(tmp_path / "run", mirror=tmp_path / "safe", keep=KeepLast(1)) as ckpt:
        for step in (1, 2, 3):
            table[step * 1900 : step * 1900 + 10] += 1
            save(ckpt, step, {"table": table})
    assert len(links(tmp_path / "safe", 3)) == 2
    path = tmp_path / "run" / "step-3" / "rank-00000.from-1.safetensors"
    write_through(path, bytes(path.stat().st_size))
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=tmp_path / "safe") as ckpt:
        back = Flat({})
        assert ckpt.restore(back).step == 3
    assert same(back.loaded, {"table": table})
