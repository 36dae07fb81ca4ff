"""Two jobs that copy the same step to the same place of an object store at the same time."""

import threading

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.errors import IntegrityError, SaveError
from checkpointing.folder import Folder
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage
from checkpointing.storage.object_store import ObjectStorage
from checkpointing.tiers import copy_step
from tests.buckets import BUCKET, served
from tests.flat_states import Flat


def saved(folder):
    with Checkpointer(folder, group=SINGLE) as ckpt:
        ckpt.save(1, Flat({"w": torch.randn(1000)})).wait()
    return folder


def test_two_jobs_that_copy_one_step_to_one_place_leave_one_whole_or_none(tmp_path, monkeypatch):
    """The other one's data come between data and manifest; then its whole checkpoint between first and last part."""
    with served(monkeypatch):
        crossing(tmp_path, monkeypatch)


def crossing(tmp_path, monkeypatch):
    places = [Folder(saved(tmp_path / name), LocalStorage()) for name in ("one", "two")]
    new, copies = ObjectStorage.write_new, []

    def crosses(self, path, data):
        if not copies:
            copies.append(copy_step)
            data_of_two(path.parent)
        new(self, path, data)

    def data_of_two(place):
        name = "rank-00000.safetensors"
        data = (places[1].at(1) / name).read_bytes()
        bucket.storage.write_stream(place / name, len(data), [data])

    bucket = Folder(*open_storage(f"{BUCKET}/both"))
    monkeypatch.setattr(ObjectStorage, "write_new", crosses)
    with pytest.raises(
        SaveError, match=r"another job has written to .*step-1 at the same time; the copy is taken back"
    ):
        copy_step(places[0], bucket, 1)
    assert not bucket.has_manifest(1)

    def arrives():
        if not bucket.has_manifest(1):
            one = threading.Thread(target=copy_step, args=(places[1], bucket, 1))
            one.start()
            one.join()

    with pytest.raises(IntegrityError, match="is another checkpoint by now; nothing is overwritten"):
        copy_step(places[0], bucket, 1, arrives)
    bucket.verify(1, lambda: None)
