"""Whatever of the unsynced requests a crash leaves on the disk: what was acknowledged loads, or something newer.

The states are counted, and written into docs/durability.md.
"""

import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.storage.local import LocalStorage
from tests.crash_disk import Disk
from tests.crash_states import Call, Record, crash_states, put, recorded
from tests.flat_states import Flat, same
from tests.spawn import run_ranks

BASE = torch.arange(20_000.0)  # large enough to be referred to by an incremental save


def state(step: int, rank: int = 0) -> dict[str, Any]:
    """What a step holds: all of it differs from every other step, and the object is rewritten with them."""
    return {"w": torch.full((700,), float(step)), f"rng.{rank}": torch.full((5,), step), "step": step, "base": BASE}


def restored(root: Path, mirror: Path | None = None) -> int | None:
    """The step a new process restores, after checking that every bit of it is that step's."""
    with Checkpointer(root, group=SINGLE, mirror=mirror) as ckpt:
        back = Flat({})
        info = ckpt.restore({"run": back})
    if info is None:
        return None
    assert back.loaded is not None
    ranks = [int(name.removeprefix("rng.")) for name in back.loaded if name.startswith("rng.")]
    wanted = state(info.step) | {name: value for rank in ranks for name, value in state(info.step, rank).items()}
    assert same(back.loaded, wanted), f"{info.path} is a mix"
    return info.step


def goes_on(root: Path) -> None:
    """A process that starts on such a disk can save, and clears what the crash left."""
    with Checkpointer(root, group=SINGLE, keep=KeepLast(2)) as ckpt:
        ckpt.restore({"run": Flat({})})
        ckpt.save(90, {"run": Flat(state(90))}).wait()
    assert restored(root) == 90


def check(
    record: Record, disk: Disk, look: Callable[[Path], int | None], *, first: int | None, every: int = 7
) -> dict[str, int]:
    """Load every different state once, and count them; every so many of them, go on from it as well."""
    seen: dict[int, int | None] = {}
    number, loads = 0, 0
    with tempfile.TemporaryDirectory(dir=shm()) as folder:
        for what, acknowledged, left in crash_states(disk, record.calls):
            number += 1
            key = hash(tuple(sorted((str(path), digest) for path, (_, digest) in left.items())))
            if key not in seen:
                root = Path(folder) / f"{number}"
                put(root, left, disk.root)
                try:
                    seen[key] = look(root)
                    loads += 1
                    if loads % every == 0:
                        goes_on(root / "run")
                except Exception as error:
                    raise AssertionError(f"{what}: {error}") from error
                shutil.rmtree(root)
            newest, found = max(acknowledged, default=first), seen[key]
            assert newest is None or (found is not None and found >= newest), (
                f"{what}: {found} was loaded, and {newest} was acknowledged"
            )
    return {"states": number, "different": loads, "calls": len(record.calls)}


def shm() -> str | None:
    """A folder in memory, where there is one: only what is in the files matters here."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def begun(folder: Path, *steps: int, **settings: Any) -> Path:
    """A run with the given checkpoints, below `folder`."""
    folder.mkdir()
    with Checkpointer(folder / "run", group=SINGLE, keep=KeepLast(2), **settings) as ckpt:
        for step in steps:
            ckpt.save(step, {"run": Flat(state(step))}).wait()
    return folder


def saves(origin: Path, *steps: int, **settings: Any) -> Record:
    with recorded() as record, Checkpointer(origin / "run", group=SINGLE, keep=KeepLast(2), **settings) as ckpt:
        if (newest := ckpt.latest()) is not None:
            ckpt.adopt(newest)
        for step in steps:
            ckpt.save(step, {"run": Flat(state(step))}).wait()
            ckpt._engine.idle()
    assert [args[0] for _, name, args in record.calls if name == "ack"] == list(steps)
    return record


def names(record: Record) -> set[str]:
    return {name for _, name, _ in record.calls}


@pytest.mark.parametrize("incremental", [False, True])
def test_saves_that_prune(tmp_path, record_property, incremental):
    origin = begun(tmp_path / "origin", 10, 20)
    disk = Disk(origin)
    record = saves(origin, 30, 31, 32, incremental=incremental)
    assert ("link" in names(record)) == incremental
    assert {"rename", "drop", "sync_folder"} <= names(record)
    counts = check(record, disk, lambda root: restored(root / "run"), first=20)
    assert counts["different"] > 150
    record_property("crash_states", counts)


def test_the_first_saves_of_a_run(tmp_path, record_property):
    origin = begun(tmp_path / "origin")
    shutil.rmtree(origin / "run", ignore_errors=True)
    disk = Disk(origin)
    record = saves(origin, 1, 2)
    record_property("crash_states", check(record, disk, lambda root: restored(root / "run"), first=None))


def test_two_tiers(tmp_path, record_property):
    """With both tiers; and with the second alone, which holds whole checkpoints only."""
    origin = begun(tmp_path / "origin", 10)
    disk = Disk(origin)
    record = saves(origin, 30, 31, mirror=origin / "safe")

    def look(root: Path) -> int | None:
        second = restored(root / "safe")
        found = restored(root / "run", root / "safe")
        assert second is None or (found is not None and second <= found)
        return found

    record_property("crash_states", check(record, disk, look, first=10, every=20))


def test_a_save_that_fails_and_one_that_goes_back(tmp_path, record_property, monkeypatch):
    """A full disk at step 30; then the user goes back to step 10, and the run goes on from there."""
    origin = begun(tmp_path / "origin", 10, 20)
    disk = Disk(origin)
    sync, full = LocalStorage.sync, [True]

    def fails_once(storage: LocalStorage, fd: int) -> None:
        if full and full.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(storage, fd)

    monkeypatch.setattr(LocalStorage, "sync", fails_once)
    with recorded() as record, Checkpointer(origin / "run", group=SINGLE, keep=KeepLast(2)) as ckpt:
        ckpt.adopt(20)
        with pytest.raises(CheckpointError, match="No space left"):
            ckpt.save(30, {"run": Flat(state(30))}).wait()
        ckpt.restore({"run": Flat({})}, step=10)
        ckpt.save(15, {"run": Flat(state(15))}).wait()
        ckpt._engine.idle()
    assert any(name == "rename" and ".aside-" in str(args[1]) for _, name, args in record.calls)
    counts = check(record, disk, lambda root: restored(root / "run"), first=10)
    record_property("crash_states", counts)


def save_on_ranks(info: Any, origin: Path) -> list[Call]:
    with recorded() as record, Checkpointer(origin / "run", keep=KeepLast(2), timeout_s=30) as ckpt:
        ckpt.adopt(20)
        ckpt.save(30, {"run": Flat(state(30, info.rank))}).wait()
    return record.calls


def test_two_ranks(tmp_path, record_property):
    """What both asked for, merged by time; read by one process, as after a change of the world."""
    origin = begun(tmp_path / "origin", 10, 20)
    disk, record = Disk(origin), Record()
    first, second = run_ranks(save_on_ranks, 2, origin)
    record.calls = sorted([*first, *(call for call in second if call[1] != "ack")], key=lambda call: call[0])
    assert {str(args[0].name) for _, name, args in record.calls if name == "create_direct"} == {
        "rank-00000.safetensors", "rank-00001.safetensors",
    }  # fmt: skip
    record_property("crash_states", check(record, disk, lambda root: restored(root / "run"), first=20))


def test_a_missing_sync_is_found_out(tmp_path, monkeypatch):
    """The proof can fail: without the sync of a file, or of the folder behind the rename, a state loses what counts."""
    for number, gone in enumerate(("sync", "sync_folder")):
        origin = begun(tmp_path / f"{number}", 10)
        disk = Disk(origin)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, gone, lambda self, path: None)
            record = saves(origin, 30)
        calls = [call for call in record.calls if call[1] != gone]
        record.calls = calls
        with pytest.raises(AssertionError, match="10 was loaded, and 30 was acknowledged"):
            check(record, disk, lambda root: restored(root / "run"), first=10)
