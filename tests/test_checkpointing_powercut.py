"""A power cut without a device mapper: a file system on a loop device, its backing file copied when `wait` returns.

The copy is what the device had been given at that instant: nothing of the page cache, no write that is still queued. It
is mounted, which replays its journal, and loaded.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, KeepLast
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, same
from tests.save_script import state

IMAGE_BYTES = 24 * 2**20


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Mount an image, and unmount and detach it whatever happens."""
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        if subprocess.run(["umount", str(place)], capture_output=True, timeout=60).returncode:
            time.sleep(1)
            run("umount", "-l", str(place))


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Path]]:
    """An ext4 file system: (its backing file, where it is mounted)."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    try:
        run("mkfs.ext4", "-q", "-F", str(image))
        with mounted(image, tmp_path / "probe"):
            pass
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no loop device here (it takes root and a kernel that has them): {error}")
    with mounted(image, tmp_path / "disk") as place:
        yield image, place


def cut(image: Path, copy: Path) -> Path:
    """What the device held at this instant."""
    shutil.copyfile(image, copy)
    return copy


def loaded(copy: Path, place: Path) -> int | None:
    with mounted(copy, place) as root, Checkpointer(root / "run", group=SINGLE) as ckpt:
        back = Flat({})
        info = ckpt.restore({"run": back})
        if info is None:
            return None
        assert same(back.loaded, state(info.step))
        return info.step


@pytest.mark.parametrize("incremental", [False, True])
def test_what_wait_returned_survives_a_power_cut(disk, tmp_path, record_property, incremental):
    image, place = disk
    with Checkpointer(place / "run", group=SINGLE, keep=KeepLast(2), incremental=incremental) as ckpt:
        for step in range(1, 11):
            ckpt.save(step, {"run": Flat(state(step))}).wait()
            copy = cut(image, tmp_path / "copy.img")
            ckpt._engine.idle()
            assert loaded(copy, tmp_path / "copy") == step
    record_property("power_cut", {"cuts": 10, "loaded": 10})


def test_without_the_syncs_it_does_not(disk, tmp_path, monkeypatch):
    """The proof can fail: with fsync of files or folders left out, the newest checkpoint is not there."""
    image, place = disk
    monkeypatch.setattr(LocalStorage, "sync_folder", lambda self, path: None)
    monkeypatch.setattr(LocalStorage, "sync", lambda self, fd: None)
    with Checkpointer(place / "run", group=SINGLE) as ckpt:
        ckpt.save(1, {"run": Flat(state(1))}).wait()
        copy = cut(image, tmp_path / "copy.img")
    monkeypatch.undo()
    assert loaded(copy, tmp_path / "copy") is None


def test_nor_does_torch_save(disk, tmp_path):
    image, place = disk
    torch.save(state(1), place / "model.pt")
    with mounted(cut(image, tmp_path / "copy.img"), tmp_path / "copy") as root:
        file = root / "model.pt"
        assert not file.exists() or file.stat().st_size == 0
