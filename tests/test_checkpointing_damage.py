"""Whatever happens to the files is noticed, named, and survived."""

import json
import shutil

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.errors import IntegrityError
from tests.flat_states import Flat, assorted, same
from tests.test_checkpointing_manifest import sealed

DATA = "rank-00000.safetensors"


@pytest.fixture
def two(tmp_path):
    """A folder with steps 10 and 20, which hold different numbers."""
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"run": Flat(assorted(step))}).wait()
    return tmp_path


def restored(path, step=None):
    with Checkpointer(path, group=SINGLE) as ckpt:
        back = Flat({})
        return ckpt.restore({"run": back}, step), back.loaded


def regions(place):
    """Return (name, first byte, last byte) of every region of the data file: length field, header, each tensor."""
    data = (place / DATA).read_bytes()
    tensors = [t for t in json.loads((place / "manifest.json").read_text())["tensors"] if t["begin"] < t["end"]]
    text_end = 8 + int.from_bytes(data[:8], "little")
    found = {f"tensor {t['name']!r}": (t["begin"], t["end"] - 1) for t in tensors}
    return found | {"the header": (0, 7), "the header ": (8, 200), "the header  ": (text_end - 1, text_end - 1)}


def assert_noticed(path, *texts):
    with pytest.raises(IntegrityError):
        restored(path, step=20)
    info, state = restored(path)
    assert info is not None
    assert info.step == 10
    assert same(state, assorted(10))
    assert [place for place, _ in info.skipped] == [path / "step-20"]
    for text in texts:
        assert text in info.skipped[0][1]
    for aside in path.glob("step-20.bad-*"):  # back to its place, for the next damage
        assert info.skipped[0][1].endswith(f"set aside as {aside.name}")
        aside.rename(path / "step-20")


def test_a_flipped_bit_anywhere_in_the_data_is_noticed_and_named(two):
    file = two / "step-20" / DATA
    good = file.read_bytes()
    for name, (first, last) in regions(two / "step-20").items():
        for at in {first, (first + last) // 2, last}:
            bad = bytearray(good)
            bad[at] ^= 1
            file.write_bytes(bad)
            assert_noticed(two, f"step-20/{DATA}", name.strip())
    file.write_bytes(good)
    assert restored(two)[0].step == 20


def test_zeroed_and_swapped_regions_are_noticed(two):
    file = two / "step-20" / DATA
    good = file.read_bytes()
    (first, last), (other, _) = (regions(two / "step-20")[f"tensor 'run.{name}'"] for name in ("page", "head.weight"))
    zeroed = good[:first] + bytes(last + 1 - first) + good[last + 1 :]
    swapped = bytearray(good)
    swapped[first : first + 16], swapped[other : other + 16] = good[other : other + 16], good[first : first + 16]
    for bad, name in ((zeroed, "page"), (swapped, "head.weight")):  # the first in the file is named
        file.write_bytes(bad)
        assert_noticed(two, DATA, f"tensor 'run.{name}'")


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(two):
    file = two / "step-20" / "manifest.json"
    good = file.read_bytes()
    for at in range(0, len(good), 41):
        file.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        assert_noticed(two, "step-20/manifest.json: manifest")


@pytest.mark.parametrize("name", [DATA, "manifest.json"])
def test_cut_grown_and_missing_files_are_noticed(two, name):
    file = two / "step-20" / name
    good = file.read_bytes()
    for bad in (b"", good[:-1], good[: len(good) // 2], good[:8], good + b"\0", good + good):
        file.write_bytes(bad)
        assert_noticed(two, f"step-20/{name}")
        with Checkpointer(two, group=SINGLE) as ckpt:
            assert ckpt.steps() == [10]
    file.unlink()
    assert_noticed(two, f"step-20/{name}: No such file")


def test_files_of_another_checkpoint_are_noticed(two):
    shutil.copy(two / "step-10" / DATA, two / "step-20" / DATA)
    assert_noticed(two, DATA)
    shutil.copy(two / "step-10" / "manifest.json", two / "step-20" / "manifest.json")
    assert_noticed(two, "the manifest is that of step 10; was the folder renamed?")


def test_when_nothing_verifies_it_is_an_error_and_not_a_fresh_start(two):
    for step in (10, 20):
        (two / f"step-{step}" / DATA).write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"nothing to restore in .*step-20/.*: 0 bytes long.*; step-10/"):
        restored(two)
    assert len(list(two.glob("step-*"))) == 2  # and nothing was set aside
    for step in (10, 20):
        (two / f"step-{step}" / "manifest.json").unlink()  # not checkpoints at all
    assert restored(two) == (None, None)


def test_a_damaged_step_is_moved_aside_when_it_is_saved_again(two):
    file = two / "step-20" / DATA
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with Checkpointer(two, group=SINGLE) as ckpt:
        assert ckpt.restore({"run": Flat({})}).step == 10
        ckpt.save(20, {"run": Flat(assorted(21))}).wait()
    info, state = restored(two)
    assert (info.step, info.skipped) == (20, ())
    assert same(state, assorted(21))
    (aside,) = two.glob("step-20.bad-*")
    assert (aside / DATA).read_bytes()[-1:] == b"\x55"


def test_what_cannot_be_read_just_now_is_passed_over_and_stays(two):
    """A device error is no proof of damage: the checkpoint may be good tomorrow."""
    data = two / "step-20" / DATA
    data.rename(two / "elsewhere")
    data.mkdir()
    info, _ = restored(two)
    assert info.step == 10
    assert info.skipped == ((two / "step-20", f"step-20/{DATA}: not a plain file (a link, pipe, device or folder)"),)
    assert data.exists()


def test_a_checkpoint_of_a_newer_version_is_never_passed_over(two):
    file = two / "step-20" / "manifest.json"
    body = json.loads(file.read_text()) | {"format_version": 9}
    del body["xxh3_64"]
    file.write_bytes(sealed(body))
    with pytest.raises(IntegrityError, match=r"step-20/manifest.json: .*format_version 9 .* upgrade longrail"):
        restored(two)
    assert file.exists()


def test_retention_never_counts_a_damaged_one_and_keeps_the_last_good_one(two):
    (two / "step-20" / DATA).write_bytes(b"")
    with Checkpointer(two, group=SINGLE, keep=KeepLast(2)) as ckpt:
        ckpt.adopt(10)
        ckpt.save(30, {"run": Flat(assorted(30))}).wait()
        assert ckpt.steps() == [10, 30]


def test_folders_that_only_look_like_steps_are_let_be(two):
    for name in ("step-007", "step-30.tmp-abc", "step-x", "step--1", "step-40"):
        (two / name).mkdir()
    (two / "step-50").write_text("a file")
    info, _ = restored(two)
    assert info.step == 20
    with Checkpointer(two, group=SINGLE) as ckpt:
        assert ckpt.steps() == [10, 20]
        ckpt.save(40, {"run": Flat({"a": torch.ones(1)})}).wait()
        assert ckpt.steps() == [10, 20, 40]


def test_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with Checkpointer(path, group=SINGLE) as ckpt:
        with pytest.raises(CheckpointError, match=r"save of step 1 failed: rank 0: .*Error.*file"):
            ckpt.save(1, Flat({"a": 1})).wait()
        with pytest.raises(CheckpointError, match=r"restore failed: rank 0: NotADirectoryError"):
            ckpt.restore(Flat({}))
        with pytest.raises(CheckpointError, match="NotADirectoryError"):
            ckpt.steps()


def test_a_bad_checkpoint_that_is_saved_anew_is_good(two):
    data = two / "step-20" / DATA
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with Checkpointer(two, group=SINGLE) as ckpt:
        assert ckpt.restore({"run": Flat({})}).step == 10
        assert not (two / "step-20").exists()
        ckpt.save(20, {"run": Flat({"anew": 1})}).wait()
        with pytest.raises(CheckpointError, match="step-20 exists already"):
            ckpt.save(20, {"run": Flat({"again": 1})}).wait()
    assert restored(two)[1] == {"anew": 1}


def test_going_back_sets_newer_checkpoints_aside_when_the_run_goes_on(two):
    with Checkpointer(two, group=SINGLE) as ckpt:
        back = Flat({})
        assert ckpt.restore({"run": back}, step=10).step == 10
        assert ckpt.steps() == [10, 20]  # to look at an old checkpoint changes nothing
        ckpt.save(15, {"run": Flat(assorted(15))}).wait()
        assert ckpt.steps() == [10, 15]
        ckpt.save(20, {"run": Flat(assorted(21))}).wait()
    info, state = restored(two)
    assert info.step == 20
    assert same(state, assorted(21))
    (aside,) = two.glob("step-20.aside-*")
    assert (aside / "manifest.json").exists()


def test_going_back_frees_the_steps_behind_it_at_once(two):
    with Checkpointer(two, group=SINGLE) as ckpt:
        ckpt.restore({"run": Flat({})}, step=10)
        ckpt.save(20, {"run": Flat(assorted(21))}).wait()
    assert same(restored(two)[1], assorted(21))
