"""An object store that hangs, is away for a while, or holds what is damaged, as the second tier of a run."""

import logging
import time

import pytest
import torch
import torch.distributed as dist

from checkpointing import SINGLE, Checkpointer, KeepLast, ObjectProvider
from checkpointing.errors import CheckpointError, SaveError, StateError
from checkpointing.folder import Folder
from checkpointing.mirror import Mirror
from checkpointing.prune import prune_run
from checkpointing.storage import open_storage
from checkpointing.storage.local import LocalStorage
from tests.buckets import BUCKET, Door, reach, served
from tests.checkpoint_commands import run
from tests.flat_states import Flat
from tests.spawn import run_ranks


@pytest.fixture(scope="module")
def endpoint():
    with pytest.MonkeyPatch.context() as patch, served(patch) as endpoint:
        yield endpoint


@pytest.fixture
def door(endpoint, monkeypatch):
    """The way to the bucket `s3://runs`."""
    door = Door(endpoint)
    reach(monkeypatch, door.url)
    yield door
    door.close()


def saved(folder, *steps):
    with Checkpointer(folder, group=SINGLE, keep=KeepLast(9)) as ckpt:
        for step in steps:
            ckpt.save(step, Flat({"a": step, "w": torch.full((1000,), step)})).wait()
    return folder


def restore_beside(info, folder, endpoint):
    with pytest.MonkeyPatch.context() as patch:
        reach(patch, endpoint)
        mirror = f"{BUCKET}/hung" if info.rank == 0 else "unused"
        ckpt = Checkpointer(folder, mirror=mirror, timeout_s=6.0)
        step = ckpt.restore(back := Flat({})).step
        dist.barrier()
        ckpt.close()
        return step, back.loaded["a"]


def test_a_bucket_that_hangs_holds_up_no_restart_whose_first_tier_is_whole(door, tmp_path, monkeypatch, caplog):
    door.mode = "silent"
    assert run_ranks(restore_beside, 2, saved(tmp_path / "run", 1, 2), door.url) == [(2, 2), (2, 2)]
    monkeypatch.setattr("checkpointing.storage.object_store._SAY_AFTER_S", 0.1)
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=f"{BUCKET}/hung", timeout_s=3.0) as ckpt:
        assert ckpt.restore(Flat({})) is not None
    assert "looking in s3://runs/hung: no answer for 0.1 s" in caplog.text
    assert "restoring without the second tier" in caplog.text
    empty = Checkpointer(tmp_path / "empty", group=SINGLE, mirror=f"{BUCKET}/hung", timeout_s=3.0)
    with empty, pytest.raises(CheckpointError, match=r"restore failed: rank 0: .*s3://runs/hung"):
        empty.restore(Flat({}))


def damage(url, step, name):
    root, storage = open_storage(url)
    path = root / f"step-{step}" / name
    data = bytearray(storage.read(path))
    data[-3] ^= 1
    storage.write_stream(path, len(data), [data])


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_what_is_damaged_in_the_second_tier_is_set_aside_there_and_copied_anew(endpoint, tmp_path, caplog, kind):
    second = f"{BUCKET}/bad" if kind == "bucket" else str(tmp_path / "safe")
    with Checkpointer(tmp_path / "one", group=SINGLE, mirror=second, keep=KeepLast(9)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, Flat({"w": torch.full((30_000,), step)})).wait()
    if kind == "bucket":
        damage(second, 2, "rank-00000.safetensors")
        damage(second, 3, "manifest.json")
    else:
        for name in ("step-2/rank-00000.safetensors", "step-3/manifest.json"):
            (tmp_path / "safe" / name).write_bytes(b"damaged")
    with Checkpointer(tmp_path / "two", group=SINGLE, mirror=second, keep=KeepLast(9)) as ckpt:
        info = ckpt.restore(Flat({}))
        assert info is not None
        assert info.step == 1
        assert [str(path) for path, _ in info.skipped] == [f"{second}/step-3", f"{second}/step-2"]
        assert all(reason.endswith("it is set aside there") for _, reason in info.skipped)
        for step in (2, 3):
            ckpt.save(step, Flat({"w": torch.full((30_000,), -step)})).wait()
    assert f"passing over {second}/step-2: " in caplog.text
    root, storage = open_storage(second)
    names = [name.partition("-")[2].partition("-")[0] for name in storage.names(root)]
    assert sorted(names) == ["1", "2", "2.bad", "3", "3.bad"]
    assert run("verify", second)[0] == 0


def test_a_fallback_that_nothing_heals_is_logged(tmp_path, caplog):
    folder = saved(tmp_path / "run", 1, 2)
    (folder / "step-2" / "rank-00000.safetensors").write_bytes(b"damaged")
    with Checkpointer(folder, group=SINGLE) as ckpt:
        assert ckpt.restore(Flat({})).step == 1
    assert f"passing over {folder}/step-2: step-2/rank-00000.safetensors: " in caplog.text


def test_only_what_is_damaged_or_of_this_run_makes_room(tmp_path):
    """In the second tier 1 is another run's, 2 this run's from before, 3 has no manifest, and 4 one that is no JSON."""
    first = Folder(saved(tmp_path / "run", 1, 2, 3, 4, 5), LocalStorage())
    safe = saved(tmp_path / "safe", 1)
    before = (safe / "step-1" / "manifest.json").read_bytes()
    mirror = Mirror(first, str(safe))
    with Checkpointer(first.root, group=SINGLE, keep=KeepLast(9)) as ckpt:
        ckpt.restore(Flat({}), step=1)
        ckpt.save(2, Flat({"a": "anew"})).wait()
    (left,) = first.root.glob("step-2.aside-*")
    left.rename(safe / "step-2")
    (safe / "step-3").mkdir()
    (safe / "step-4").mkdir()
    (safe / "step-4" / "manifest.json").write_text("{}")
    (set_aside,) = first.root.glob("step-3.aside-*")
    set_aside.rename(first.root / "step-3")
    for step in (1, 2, 3):
        mirror.copy(step)
    mirror.leave_newer(3, "of another run")  # whose 4 was, nobody can tell: it is damaged
    with pytest.raises(SaveError, match=r"lacks a checkpoint: .*step-1 is another checkpoint; nothing is overwritten"):
        mirror.close(timeout_s=60)
    assert (safe / "step-1" / "manifest.json").read_bytes() == before
    names = sorted(path.name.partition("-")[2].partition("-")[0] for path in safe.glob("step-*"))
    assert names == ["1", "2", "2.aside", "3", "3.bad", "4.bad"]


def until(done):
    give_up = time.monotonic() + 60
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_what_an_outage_missed_is_copied_later_and_what_is_gone_by_then_is_said(door, tmp_path, monkeypatch, caplog):
    for name in ("_STALL_S", "_WRITE_S"):
        monkeypatch.setattr(f"checkpointing.storage.object_store.{name}", 1.0)
    second, keep = f"{BUCKET}/outage", KeepLast(2)
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=second, keep=keep) as ckpt:
        mirror = ckpt._committer.mirror
        assert mirror is not None
        door.mode = "shut"
        for step in (1, 2, 3):  # 1 goes from the first tier meanwhile
            ckpt.save(step, Flat({"a": step})).wait()
            until(lambda: ckpt._engine.idle(1) and not mirror.pending())
        door.mode = "open"
        ckpt.save(4, Flat({"a": 4})).wait()
    assert "the second tier: step 1 to s3://runs/outage: " in caplog.text
    assert "the second tier: step 3 is in s3://runs/outage now" in caplog.text
    assert "s3://runs/outage never got steps that are gone from the first tier since: 1" in caplog.text
    assert {"step-3", "step-4"} <= set(mirror.second.storage.names(mirror.second.root))
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=second, keep=keep) as ckpt:
        assert ckpt.restore(Flat({})) is not None
        mirror = ckpt._committer.mirror
        assert mirror is not None
        door.mode = "shut"
        ckpt.save(5, Flat({"a": 5})).wait()
        until(lambda: ckpt._engine.idle(1) and not mirror.pending())
        door.mode = "open"  # the last one: the close tries again
    assert "step-5" in mirror.second.storage.names(mirror.second.root)


def test_a_close_that_waits_for_copies_says_so(tmp_path, monkeypatch, caplog):
    stream = LocalStorage.write_stream
    monkeypatch.setattr("checkpointing.mirror._SAY_FIRST_S", 0.01)
    monkeypatch.setattr(LocalStorage, "write_stream", lambda *args: (time.sleep(0.3), stream(*args)))
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=tmp_path / "safe", timeout_s=60.0) as ckpt:
        for step in (1, 2):
            ckpt.save(step, Flat({"a": step})).wait()
    assert f"copies to {tmp_path}/safe, for 60 s at most" in caplog.text
    assert len([path for path in (tmp_path / "safe").iterdir() if path.is_dir()]) == 2


def test_a_save_does_not_wait_for_the_second_tier_which_is_looked_at_meanwhile(door, tmp_path):
    """Another run's checkpoint is there: it is found, but not inside of `save`, where the bucket does not answer."""
    second = f"{BUCKET}/theirs"
    with Checkpointer(tmp_path / "theirs", group=SINGLE, mirror=second) as ckpt:
        ckpt.save(9, Flat({"a": 9})).wait()
    door.mode = "silent"
    ckpt = Checkpointer(tmp_path / "mine", group=SINGLE, mirror=second)
    handle = ckpt.save(5, Flat({"a": 5, "w": torch.ones(100_000)}))
    handle.staged()
    door.mode = "open"
    with pytest.raises(StateError, match=r"s3://runs/theirs/step-9 is of another run"):
        handle.wait()
    ckpt.close()
    assert list((tmp_path / "mine").glob("step-*")) == []


def test_errors_of_a_store_have_their_cause_in_one_line(endpoint):
    root, storage = open_storage("s3://nobody/run")
    for call in (lambda: storage.names(root), lambda: storage.write_new(root / "latest", b"1")):
        with pytest.raises(
            OSError, match=r"NoSuchBucket: The specified bucket does not exist: 's3://nobody/run"
        ) as told:
            call()
        assert "\n" not in str(told.value)
        assert "<" not in str(told.value)
    assert str(root / "step-1" / "x") == f"{root}/step-1/x" == "s3://nobody/run/step-1/x"
    assert str((root / "step-1").relative_to(root)) == "step-1"


def save_own_objects(info, folder):
    said = []
    logging.getLogger("checkpointing").addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())

    class Mine(Flat):
        def state_providers(self):
            return {name: ObjectProvider(value) for name, value in self.state.items()}

    with Checkpointer(folder, keep=KeepLast(1)) as ckpt:
        for step in (1, 2):
            ckpt.save(
                step, {"mine": Mine({"seen": [info.rank], "same": [1]}), f"own{info.rank}": Mine({"x": [7]})}
            ).wait()
    logging.getLogger("checkpointing").removeHandler(handler)
    return [text for text in said if "differs" in text]


def test_an_object_that_is_not_the_same_on_all_ranks_is_said_once(tmp_path):
    said, others = run_ranks(save_own_objects, 2, tmp_path / "run")
    assert len(said) == 1
    assert said[0].startswith("object 'mine.seen' differs between rank 0 and rank 1, and one of them is saved")
    assert said[0].endswith('as f"mine{rank}"')
    assert others == []


def test_what_prunes_the_second_tier_leaves_a_copy_under_way_alone(tmp_path, monkeypatch):
    safe, new = Folder(tmp_path / "safe", LocalStorage()), LocalStorage.write_new
    pruned = []

    def prunes(self, path, data):
        if path.is_relative_to(safe.root):
            pruned.append(prune_run(safe, 9, dry_run=False, read=lambda _: None))
        new(self, path, data)

    monkeypatch.setattr(LocalStorage, "write_new", prunes)
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=safe.root) as ckpt:
        ckpt.save(1, Flat({"w": torch.zeros(30_000)})).wait()
    assert pruned == [[]]
    safe.verify(1, lambda: None)


def test_a_failed_copy_of_what_the_run_went_back_behind_is_not_owed(tmp_path, monkeypatch):
    stream = LocalStorage.write_stream

    def fails(self, path, length, parts):
        if path.is_relative_to(tmp_path / "safe") and "step-3" in str(path):
            raise OSError(5, "Input/output error")
        stream(self, path, length, parts)

    monkeypatch.setattr(LocalStorage, "write_stream", fails)
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=tmp_path / "safe", keep=KeepLast(9)) as ckpt:
        mirror = ckpt._committer.mirror
        assert mirror is not None
        for step in (1, 2, 3):
            ckpt.save(step, Flat({"a": step})).wait()
        until(lambda: ckpt._engine.idle(1) and not mirror.pending())
        ckpt.restore(Flat({}), step=1)
        ckpt.save(2, Flat({"a": -2})).wait()
    assert mirror.second.candidates() == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_copying_that_broke_off_is_told(tmp_path, monkeypatch):
    def breaks(*_):
        raise KeyboardInterrupt  # as a panic in a library of Rust is: no Exception

    ckpt = Checkpointer(tmp_path / "run", group=SINGLE, mirror=tmp_path / "safe")
    monkeypatch.setattr(LocalStorage, "write_stream", breaks)
    ckpt.save(1, Flat({"a": 1})).wait()
    with pytest.raises(SaveError, match="broke off at step 1; the first tier is whole"):
        ckpt.close()


def test_what_lost_its_manifest_is_not_in_the_way_of_its_copy(tmp_path):
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=tmp_path / "safe") as ckpt:
        ckpt.save(1, Flat({"a": 1})).wait()
    (tmp_path / "run" / "step-1" / "manifest.json").unlink()
    with Checkpointer(tmp_path / "run", group=SINGLE, mirror=tmp_path / "safe") as ckpt:
        assert ckpt.restore(Flat({})) is not None
    Folder(tmp_path / "run", LocalStorage()).verify(1, lambda: None)
    assert len(list((tmp_path / "run").glob("step-1.bad-*"))) == 1
