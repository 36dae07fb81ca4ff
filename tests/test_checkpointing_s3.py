"""Second tiers: another folder, and an object store over real S3 HTTP."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, KeepLast
from checkpointing.errors import CheckpointError, IntegrityError, SaveError
from checkpointing.folder import Folder
from checkpointing.formats import open_source
from checkpointing.mirror import Mirror
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage
from checkpointing.tiers import copy_step
from tests.buckets import BUCKET, served
from tests.checkpoint_commands import run, run_json
from tests.flat_states import Flat, assorted, same
from tests.spawn import ROOT

DATA = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a server that this test starts; yields its URL."""
    with pytest.MonkeyPatch.context() as patch, served(patch):
        yield BUCKET


@pytest.fixture
def run_folder(tmp_path):
    """Two steps, the newer with rows in the file of the older."""
    large = torch.randn(5_000_000)
    with Checkpointer(tmp_path / "fast", group=SINGLE, incremental=True) as ckpt:
        for step in (10, 20):
            large[:50] += 1
            place = ckpt.save(step, Flat(assorted(step) | {"large": large})).wait()
    assert (place / DATA).stat().st_size < 5_000_000 < (place / "rank-00000.from-10.safetensors").stat().st_size
    return Folder(tmp_path / "fast", LocalStorage())


def numbers(url):
    source = open_source(url)
    return source.step, {name: lazy.read() for name, lazy in source.tensors.items()}


def test_a_bucket_is_a_place_of_checkpoints(bucket, run_folder, tmp_path):
    url = f"{bucket}/a"
    mirror = Mirror(run_folder, url)
    for step in (10, 20):
        mirror.copy(step)
    mirror.close(timeout_s=60)
    assert [(row["step"], row["ok"]) for row in run_json("ls", url)] == [(10, True), (20, True)]
    assert run("verify", url)[0] == 0
    step, tensors = numbers(url)
    assert step == 20
    assert same(tensors, numbers(run_folder.root)[1])
    assert numbers(f"{url}/step-10")[0] == 10
    run("restore", f"{url}@10", tmp_path / "x.pt", "--format", "torch")
    back = Folder(tmp_path / "back", LocalStorage())
    copy_step(Folder(*open_storage(url)), back, 20)
    with Checkpointer(tmp_path / "back", group=SINGLE) as ckpt:
        found = Flat({})
        assert ckpt.restore(found).step == 20
    assert same(found.loaded["large"], tensors["large"])


def test_the_manifest_is_the_commit(bucket, run_folder):
    url = f"{bucket}/b"
    copy_step(run_folder, Folder(*open_storage(url)), 10)
    root, storage = open_storage(url)
    for path in (run_folder.at(20)).glob("*.safetensors"):  # an upload that was cut before its manifest
        storage.write_new(root / "step-20" / path.name, path.read_bytes())
    assert numbers(url)[0] == 10
    rows = run_json("ls", url, ok=(1,))
    assert [row["ok"] for row in rows] == [True, False]
    copy_step(run_folder, Folder(root, storage), 20)
    assert numbers(url)[0] == 20


def test_a_damaged_object_is_named(bucket, run_folder):
    url = f"{bucket}/c"
    copy_step(run_folder, Folder(*open_storage(url)), 10)
    root, storage = open_storage(url)
    data = bytearray((run_folder.at(10) / DATA).read_bytes())
    data[-1] ^= 1
    storage.write_stream(root / "step-10" / DATA, len(data), [data])
    _, text = run("verify", url, ok=(1,))
    assert f"step-10/{DATA}: tensor " in text
    with pytest.raises(IntegrityError, match=r"is not what was saved"):
        numbers(url)


def test_what_is_damaged_in_the_first_tier_never_reaches_the_second(run_folder, tmp_path):
    file = run_folder.at(20) / DATA
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    mirror = Mirror(run_folder, str(tmp_path / "safe"))
    mirror.copy(10)
    mirror.copy(20)
    with pytest.raises(
        SaveError, match=r"the second tier lacks a checkpoint: step-20/.*tensor .* is not what was saved"
    ):
        mirror.close(timeout_s=60)
    assert [path.name for path in (tmp_path / "safe").iterdir()] == ["step-10"]
    assert run("verify", tmp_path / "safe")[0] == 0


def test_another_checkpoint_in_the_second_tier_is_not_overwritten(run_folder, tmp_path):
    safe = tmp_path / "safe"
    with Checkpointer(safe, group=SINGLE) as ckpt:
        ckpt.save(20, Flat({"other": 1})).wait()
    before = json.loads((safe / "step-20" / "manifest.json").read_text())
    with pytest.raises(IntegrityError, match=r"step-20 is another checkpoint; nothing is overwritten"):
        copy_step(run_folder, Folder(safe, LocalStorage()), 20)
    assert json.loads((safe / "step-20" / "manifest.json").read_text()) == before
    assert copy_step(run_folder, Folder(safe, LocalStorage()), 10) == safe / "step-10"
    assert copy_step(run_folder, Folder(safe, LocalStorage()), 10) == safe / "step-10"  # there already: nothing to do


def test_a_checkpointer_mirrors_in_the_background_and_restores_from_the_second_tier(tmp_path):
    fast, safe = tmp_path / "fast", tmp_path / "safe"
    with Checkpointer(fast, group=SINGLE, mirror=str(safe)) as ckpt:
        ckpt.save(10, Flat(assorted(1))).wait()
        ckpt.save(20, Flat(assorted(2))).wait()
    assert sorted(path.name for path in safe.iterdir()) == ["step-10", "step-20"]
    for path in fast.glob("step-*"):  # the machine with the quick disk is gone
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with Checkpointer(fast, group=SINGLE, mirror=str(safe)) as ckpt:
        back = Flat({})
        info = ckpt.restore(back)
    assert info.step == 20
    assert info.path == Path(fast / "step-20")
    assert same(back.loaded, assorted(2))


def test_a_second_tier_that_cannot_be_reached(run_folder, tmp_path, monkeypatch, caplog):
    """The first tier is enough, and it is said; without it there is nothing to start over from in silence."""
    safe = tmp_path / "safe"
    names = LocalStorage.names

    def unreachable(self, path):
        if path == safe:
            raise OSError(5, "the object store does not answer")
        return names(self, path)

    monkeypatch.setattr(LocalStorage, "names", unreachable)
    with Checkpointer(run_folder.root, group=SINGLE, mirror=safe) as ckpt:
        assert ckpt.restore(Flat({})).step == 20
    assert "restoring without the second tier" in caplog.text
    empty = Checkpointer(tmp_path / "empty", group=SINGLE, mirror=safe)
    with empty, pytest.raises(CheckpointError, match=r"restore failed: rank 0: .*does not answer"):
        empty.restore(Flat({}))


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_run_that_went_back_goes_on_from_there_in_both_tiers(bucket, tmp_path, place):
    """The second tier still had the steps that were left, newer than all that was saved since."""
    fast, second = tmp_path / "fast", tmp_path / "safe" if place == "folder" else f"{bucket}/back"
    with Checkpointer(fast, group=SINGLE, keep=KeepLast(1), mirror=second) as ckpt:
        for step in range(1, 6):
            ckpt.save(step, Flat({"a": step})).wait()
    with Checkpointer(fast, group=SINGLE, keep=KeepLast(1), mirror=second) as ckpt:
        assert ckpt.restore(Flat({}), step=2).step == 2
        ckpt.save(3, Flat({"a": "anew"})).wait()
        # As after a crash in this moment: what was left is in the second tier.
        assert ckpt._committer.mirror is not None
        with Checkpointer(fast, group=SINGLE, mirror=second) as other:
            assert other.restore(back := Flat({})).step == 3
        assert back.loaded == {"a": "anew"}
        ckpt.save(4, Flat({"a": "anew, too"})).wait()
    shutil.rmtree(fast / "step-4")  # from here on the second tier is what is newer
    for lost in (None, fast):
        if lost is not None:
            shutil.rmtree(lost)
        with Checkpointer(fast, group=SINGLE, mirror=second) as ckpt:
            assert ckpt.restore(back := Flat({})).step == 4
        assert back.loaded == {"a": "anew, too"}


def test_a_copy_that_fails_is_said_at_once_and_made_later(tmp_path, monkeypatch, caplog):
    stream, errors = LocalStorage.write_stream, iter([OSError(122, "Disk quota exceeded"), MemoryError("none")])

    def fails(self, path, length, parts):
        if (error := next(errors, None)) is not None:
            raise error
        stream(self, path, length, parts)

    monkeypatch.setattr(LocalStorage, "write_stream", fails)
    ckpt = Checkpointer(tmp_path / "fast", group=SINGLE, mirror=tmp_path / "safe")
    for step in (1, 2, 3):
        ckpt.save(step, Flat({"a": step})).wait()
    assert ckpt._engine.idle(20)
    mirror = ckpt._committer.mirror
    while mirror.pending():
        time.sleep(0.01)
    assert "the second tier: step 1 to" in caplog.text
    assert "the second tier: step 2 to" in caplog.text
    ckpt.close()
    assert sorted(path.name for path in (tmp_path / "safe").iterdir()) == ["step-1", "step-2", "step-3"]


def test_a_save_that_failed_is_raised_before_a_copy_that_failed(tmp_path, monkeypatch):
    (tmp_path / "safe").write_text("no folder")
    ckpt = Checkpointer(tmp_path / "fast", group=SINGLE, mirror=tmp_path / "safe")
    ckpt.save(1, Flat({"a": 1})).wait()
    sync = LocalStorage.sync
    monkeypatch.setattr(LocalStorage, "sync", lambda self, fd: (_ for _ in ()).throw(OSError(28, "full")))
    ckpt.save(2, Flat({"a": 2}))
    with pytest.raises(SaveError, match=r"save of step 2 failed: .*full"):
        ckpt.close()
    monkeypatch.setattr(LocalStorage, "sync", sync)


AT_EXIT = """
import sys, time
from checkpointing import SINGLE, Checkpointer, KeepLast
from checkpointing.storage.local import LocalStorage
from tests.buckets import BUCKET, served
from tests.flat_states import Flat
stream = LocalStorage.write_stream
def slow(self, path, length, parts):
    time.sleep(0.5)
    if sys.argv[2] == "full":
        raise OSError(28, "No space left on device")
    stream(self, path, length, parts)
LocalStorage.write_stream = slow
ckpt = Checkpointer(sys.argv[1] + "/fast", group=SINGLE, mirror=sys.argv[1] + "/safe")
ckpt.save(1, Flat({"a": 1})).wait()
"""


@pytest.mark.parametrize("how", ["well", "full"])
def test_a_copy_under_way_at_the_end_of_a_process_is_made_or_it_is_said(tmp_path, how):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "safe" / "step-1" / "manifest.json").exists() == (how == "well")
    assert ("the second tier lacks a checkpoint: step 1 to" in done.stderr) == (how == "full")


@pytest.mark.parametrize("only_there", [True, False])
def test_a_second_tier_that_goes_away_while_a_restore_looks(run_folder, tmp_path, monkeypatch, caplog, only_there):
    """A newer step is there only, or here and damaged; the older one here is whole."""
    safe = tmp_path / "safe"
    copy_step(run_folder, Folder(safe, LocalStorage()), 20)
    if only_there:
        shutil.rmtree(run_folder.at(20))
    else:
        (run_folder.at(20) / DATA).write_bytes(b"damaged")
    names = LocalStorage.names

    def away(self, path):
        if path.parent == safe:
            raise OSError(5, "the object store does not answer")
        return names(self, path)

    monkeypatch.setattr(LocalStorage, "names", away)
    with Checkpointer(run_folder.root, group=SINGLE, mirror=safe) as ckpt:
        assert ckpt.restore(Flat({})).step == 10
    assert "restoring without the second tier" in caplog.text


def test_prune_and_doctor_know_buckets(bucket, run_folder):
    url = f"{bucket}/d"
    for step in (10, 20):
        copy_step(run_folder, Folder(*open_storage(url)), step)
    assert run("prune", url, "--keep", "1", "--dry-run")[1] == "would remove step-10\n"
    assert run("prune", url, "--keep", "1")[1] == "removed step-10\n"
    assert [row["step"] for row in run_json("ls", url)] == [20]
    root, storage = open_storage(url)
    assert storage.names(root) == ["step-20"]
    assert "objects can be written, read and removed" in run("doctor", url)[1]
    assert storage.names(root) == ["step-20"]


@pytest.mark.parametrize("url", ["s3://runs/e", "s3:/runs/e"])
def test_a_bucket_is_nowhere_taken_for_a_folder(run_folder, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for args in (("save", run_folder.root, url), ("restore", run_folder.root, url, "--format", "torch")):
        assert "is no folder" in run(*args, ok=(2,))[1]
    with pytest.raises(CheckpointError, match="is no folder"):
        Checkpointer(Path(url), group=SINGLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
