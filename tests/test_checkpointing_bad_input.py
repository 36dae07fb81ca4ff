"""What someone put into the folder, or a disk that is full: a clear error, nothing executed, nothing deleted."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.errors import IntegrityError, SaveError
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, assorted, same
from tests.launch_jobs import snapshot
from tests.test_checkpointing_manifest import sealed

DATA = "rank-00000.safetensors"


MISSING = r"(?s)restore failed: .*Missing key"


class Bomb:
    """Whoever unpickles this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def one(tmp_path):
    """A folder with step 10."""
    root = tmp_path / "run"
    with Checkpointer(root, group=SINGLE) as ckpt:
        ckpt.save(10, {"run": Flat(assorted(10))}).wait()
    return root


def body_of(root: Path, step: int = 10) -> dict[str, Any]:
    body = json.loads((root / f"step-{step}" / "manifest.json").read_text())
    del body["xxh3_64"]
    return body


def restore_error(root: Path, step: int | None = None) -> str:
    with Checkpointer(root, group=SINGLE) as ckpt:
        back = Flat({})
        with pytest.raises(CheckpointError) as caught:
            ckpt.restore({"run": back}, step)
        assert back.loaded is None
    return str(caught.value)


def verify(root: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "checkpointing", "verify", str(root)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


HOSTILE = [
    (lambda body: body["files"][0].update(path="../secret.safetensors"), "is not a plain name"),
    (lambda body: body["files"][0].update(path="/etc/passwd"), "is not a plain name"),
    (lambda body: body["files"][0].update(length=2**63), "an integer from 8"),
    (lambda body: body["tensors"][0].update(begin=8, end=2**62), "outside of the files"),
    (lambda body: body["tensors"][0].update(shape=[2**40, 2**40], global_shape=[2**40, 2**40]), "too large"),
    (lambda body: body.update(step=10**18 * 10), "step is"),
    (lambda body: body.update(world_size=-1), "world_size is -1"),
    (lambda body: body.update(values={"a": {"$float": "__import__('os')"}}), "is not a number"),
]


@pytest.mark.parametrize(("change", "text"), HOSTILE)
def test_hostile_manifests(one, tmp_path, monkeypatch, change, text):
    (tmp_path / "secret.safetensors").write_bytes((one / "step-10" / DATA).read_bytes())
    body = body_of(one)
    change(body)
    (one / "step-10" / "manifest.json").write_bytes(sealed(body))
    before = snapshot(tmp_path)
    opened: list[Path] = []
    real = LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", lambda self, path: opened.append(path) or real(self, path))
    error = restore_error(one)
    assert text in error
    assert "step-10/manifest.json: " in error
    assert snapshot(tmp_path) == before
    assert {path.name for path in opened} <= {"manifest.json"}


@pytest.mark.parametrize(
    "text", ['{"step":' + "1" * 5000 + "}", '{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 10**6, '{"step":1e999}', ""]
)
def test_json_that_is_meant_to_break_parsers(one, text):
    (one / "step-10" / "manifest.json").write_bytes(sealed({})[:28] + text.encode())
    before = snapshot(one)
    assert "step-10/manifest.json: manifest" in restore_error(one)
    assert snapshot(one) == before


@pytest.mark.slow
def test_a_million_entries_and_a_file_without_end(one):
    body = body_of(one)
    entry = body["tensors"][0]
    body["tensors"] = [entry | {"name": f"t{number}"} for number in range(10**6)]
    manifest = one / "step-10" / "manifest.json"
    manifest.write_bytes(sealed(body))
    assert "overlap" in restore_error(one)
    with manifest.open("wb") as file:
        file.truncate(2**40)  # sparse
    assert f"{2**40} bytes long, and at most" in restore_error(one) or "File too large" in restore_error(one)
    assert manifest.exists()


def test_a_tensor_larger_than_memory(one):
    """Sealed, consistent and sparse on the disk: refused when there is no memory for it, not a crash."""
    body, size = body_of(one), 2**43
    big = body["tensors"][0] | {
        "name": "run.big",
        "dtype": "U8",
        "shape": [size],
        "global_shape": [size],
        "offset": [0],
    }
    body |= {"tensors": [big | {"begin": 4096, "end": 4096 + size}], "aliases": {}, "objects": {}, "piece_bytes": 2**62}
    body["files"][0] |= {"length": 4096 + size, "head_bytes": 4096, "pieces": "0" * 16}
    try:
        os.truncate(one / "step-10" / DATA, 4096 + size)
    except OSError:
        pytest.skip("the file system has no files of 8 TiB, even empty ones")
    (one / "step-10" / "manifest.json").write_bytes(sealed(body))
    error = restore_error(one)
    assert "restore failed: " in error
    assert "memory" in error
    os.truncate(one / "step-10" / DATA, 0)


def test_pickles_are_never_loaded(one, tmp_path):
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    for name in ("manifest.json", DATA, "latest"):
        file = one / name if name == "latest" else one / "step-10" / name
        good = file.read_bytes()
        file.write_bytes(bomb + bytes(max(0, len(good) - len(bomb))) if name == DATA else bomb)
        if name == "latest":
            with Checkpointer(one, group=SINGLE) as ckpt:
                assert ckpt.restore({"run": Flat({})}).step == 10
        else:
            assert f"step-10/{name}: " in restore_error(one)
            code, text = verify(one)
            assert (code, name in text) == (1, True), text
        file.write_bytes(good)
    assert not mark.exists()


def test_a_pickle_that_is_declared_an_object_is_refused(tmp_path):
    mark = tmp_path / "executed"
    bomb = torch.frombuffer(bytearray(pickle.dumps(Bomb(mark))), dtype=torch.uint8)
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        ckpt.save(10, {"run": Flat({"bomb": bomb})}).wait()
    body = body_of(tmp_path / "run")
    (tmp_path / "run" / "step-10" / "manifest.json").write_bytes(sealed(body | {"objects": {"run.bomb": "msgpack"}}))
    assert "run.bomb" in restore_error(tmp_path / "run")
    assert not mark.exists()
    (tmp_path / "run" / "step-10" / "manifest.json").write_bytes(sealed(body | {"objects": {"run.bomb": "pickle"}}))
    assert "is 'pickle'; upgrade longrail" in restore_error(tmp_path / "run")
    assert not mark.exists()


def test_another_runs_folder(one):
    """Its checkpoints do not fit the model: the model's own error, and nothing is changed. Saves let them be."""
    before = snapshot(one)
    model = torch.nn.Linear(2, 2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        Checkpointer(one, group=SINGLE) as ckpt,
        pytest.raises(CheckpointError, match=MISSING),
    ):
        ckpt.restore({"run": model})
    assert same(dict(model.state_dict()), weights)
    assert snapshot(one) == before
    body = body_of(one)
    (one / "step-11").mkdir()
    (one / "step-11" / DATA).write_bytes((one / "step-10" / DATA).read_bytes())
    (one / "step-11" / "manifest.json").write_bytes(sealed(body | {"step": 11, "run_id": "f" * 32}))
    with Checkpointer(one, group=SINGLE, keep=KeepLast(1)) as ckpt:
        ckpt.adopt(11)
        for step in (12, 13):
            ckpt.save(step, {"run": Flat(assorted(step))}).wait()
        ckpt._engine.idle()
        assert ckpt.steps() == [10, 13]  # the run it goes on with; the other one stays


@pytest.mark.parametrize("rank_file_of", ["another run", "another step"])
def test_files_of_one_length_are_told_apart(one, tmp_path, rank_file_of):
    other = tmp_path / "other"
    with Checkpointer(other if rank_file_of == "another run" else one, group=SINGLE) as ckpt:
        ckpt.save(11, {"run": Flat(assorted(11))}).wait()
    source = (other if rank_file_of == "another run" else one) / "step-11" / DATA
    target = one / "step-10" / DATA
    assert target.stat().st_size == source.stat().st_size
    target.write_bytes(source.read_bytes())
    with pytest.raises(IntegrityError, match=f"step-10/{DATA}: tensor "), Checkpointer(one, group=SINGLE) as ckpt:
        ckpt.restore({"run": Flat({})}, step=10)


def test_links_out_of_the_folder_are_not_followed(one, tmp_path):
    """A leftover, or a checkpoint to be pruned, that is a link: the link goes, and never what it points to."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("years of work")
    run = body_of(one)["run_id"][:8]
    (one / f"step-15.tmp-{run}-00000000").symlink_to(outside)
    moved = tmp_path / "moved"
    (one / "step-10").rename(moved)
    (one / "step-10").symlink_to(moved)
    with Checkpointer(one, group=SINGLE, keep=KeepLast(1)) as ckpt:
        assert ckpt.restore({"run": Flat({})}).step == 10
        ckpt.save(20, {"run": Flat(assorted(20))}).wait()
        ckpt._engine.idle()
        assert ckpt.steps() == [20]
    assert (outside / "thesis.txt").read_text() == "years of work"
    assert (moved / "manifest.json").exists()
    assert sorted(path.name for path in one.iterdir()) == ["latest", "step-20"]


def test_a_checkpoint_of_a_newer_version_is_neither_loaded_nor_moved_nor_pruned(one):
    newer = {**body_of(one), "format_version": 9, "something": "new"}
    (one / "step-10" / "manifest.json").write_bytes(sealed(newer))
    before = snapshot(one)
    for step in (None, 10):
        assert "format_version 9 and this library reads up to 2; upgrade longrail" in restore_error(one, step)
    code, text = verify(one)
    assert (code, "upgrade longrail" in text) == (1, True), text
    assert snapshot(one) == before
    with Checkpointer(one, group=SINGLE, keep=KeepLast(1)) as ckpt:
        with pytest.raises(CheckpointError, match="step-10 exists already"):
            ckpt.save(10, {"run": Flat(assorted(10))}).wait()
        for step in (11, 12):
            ckpt.save(step, {"run": Flat(assorted(step))}).wait()
        ckpt._engine.idle()
    assert (one / "step-10" / "manifest.json").read_bytes() == before["step-10/manifest.json"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_full_disk(small_disk):
    with Checkpointer(small_disk / "run", group=SINGLE) as ckpt:
        ckpt.save(1, Flat({"a": torch.ones(250_000)})).wait()
        ckpt._engine.idle()
        before = snapshot(small_disk)
        (small_disk / "filler").write_bytes(bytes(1_500_000))
        with pytest.raises(SaveError, match=r"save of step 2 failed: .*No space left on device"):
            ckpt.save(2, Flat({"a": torch.ones(250_000)})).wait()
        (small_disk / "filler").unlink()
        assert snapshot(small_disk) == before
        ckpt.save(2, Flat({"a": torch.full((250_000,), 2.0)})).wait()
        ckpt.restore(back := Flat({}))
    assert same(back.loaded, {"a": torch.full((250_000,), 2.0)})


def test_a_read_only_disk(small_disk):
    root = small_disk / "run"
    with Checkpointer(root, group=SINGLE) as ckpt:
        for step in (1, 2):
            ckpt.save(step, Flat({"a": step})).wait()
    data = root / "step-2" / DATA
    data.write_bytes(data.read_bytes() + b"?")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = snapshot(small_disk)
    with Checkpointer(root, group=SINGLE) as ckpt:
        with pytest.raises(CheckpointError, match=f"save of step 3 failed: .*{os.strerror(errno.EROFS)}"):
            ckpt.save(3, Flat({"a": 3})).wait()
        info = ckpt.restore(back := Flat({}))  # the damaged one is passed over, and cannot be moved
        assert (info.step, back.loaded) == (1, {"a": 1})
        assert [path for path, _ in info.skipped] == [root / "step-2"]
    assert snapshot(small_disk) == before
