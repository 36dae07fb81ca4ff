"""Second tiers: another folder, and an object store over real S3 HTTP."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.errors import CheckpointError, IntegrityError, SaveError
from checkpointing.folder import Folder
from checkpointing.formats import open_source
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage
from checkpointing.tiers import Mirror, copy_step
from tests.flat_states import Flat, assorted, same
from tests.test_checkpointing_cli import run, run_json

DATA = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a server that this test starts; yields its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/runs", method="PUT")).read()
        yield "s3://runs"
    server.stop()


@pytest.fixture
def run_folder(tmp_path):
    with Checkpointer(tmp_path / "fast", group=SINGLE) as ckpt:
        for step in (10, 20):
            ckpt.save(step, Flat(assorted(step) | {"large": torch.randn(5_000_000)})).wait()
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
