"""Large live tensors are filled as a restore reads; only verified bytes, and nothing that is torn is saved."""

import json

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, KeepLast, reading
from checkpointing.errors import IntegrityError, StateError
from checkpointing.targets import LEAST_BYTES, targets_of
from tests.flat_states import Flat

PIECE = 4 * 2**20
LARGE = 3 * PIECE // 4 + 12345
"""Elements of fp32: a tensor of four pieces, whose beginning and end are no multiple of a page."""


def numbers(seed, **sizes):
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=made) for name, size in sizes.items()}


def state(seed):
    return numbers(seed, a=70_001, b=LARGE, c=3, d=LARGE // 3)


def save(path, **steps):
    with Checkpointer(path, group=SINGLE, keep=KeepLast(9)) as ckpt:
        for step, tensors in steps.items():
            ckpt.save(int(step[1:]), Flat(dict(tensors))).wait()


def damage(place, name, at):
    """Turn one bit of a tensor."""
    entry = next(t for t in json.loads((place / "manifest.json").read_text())["tensors"] if t["name"] == name)
    with (place / entry["file"]).open("r+b") as file:
        file.seek(entry["begin"] + at)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cached", [True, False])
def test_large_tensors_are_filled_where_they_lie(tmp_path, cached):
    save(tmp_path, s1=state(1))
    if cached:
        for file in (tmp_path / "step-1").iterdir():
            file.read_bytes()
    live = Flat(state(2))
    before = {name: tensor.data_ptr() for name, tensor in live.state.items()}
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        assert ckpt.restore(live).step == 1
    assert equal(live.loaded, state(1))
    assert {name for name in before if live.loaded[name].data_ptr() == before[name]} == {"a", "b", "d"}
    assert equal({"c": live.state["c"]}, {"c": state(2)["c"]})  # a small one is the state's to take


def test_buffers_that_never_come_free_end_the_read(tmp_path, monkeypatch):
    save(tmp_path, s1=state(1))
    monkeypatch.setattr(reading, "_PATIENCE_S", 0.05)
    with Checkpointer(tmp_path, group=SINGLE, staging_bytes=4 * PIECE) as ckpt:
        ring = ckpt._engine.ring
        held = [ring.acquire(0.0) for _ in range(ring.num_slabs)]  # as by writes that hang
        with pytest.raises(IntegrityError, match=r"no buffer came free for 0\.05 s"):
            ckpt.restore(Flat(state(2)))
        for slab in held:
            ring.release(slab)
        assert equal(restored(ckpt), state(1))


def restored(ckpt):
    live = Flat(state(2))
    ckpt.restore(live)
    return live.loaded


def test_another_shape_dtype_or_place_gets_memory_of_its_own(tmp_path):
    save(tmp_path, s1={name: tensor for name, tensor in state(1).items() if name != "c"})
    live = Flat({"a": torch.zeros(70_001, dtype=torch.int32), "b": torch.zeros(2 * LARGE)[::2], "d": torch.zeros(7)})
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.restore(live)
    assert equal(live.loaded, {name: tensor for name, tensor in state(1).items() if name != "c"})
    assert not any(tensor.any() for tensor in live.state.values())


def test_what_shares_memory_is_not_filled_in_place():
    flat, alone = torch.zeros(LEAST_BYTES), torch.zeros(LEAST_BYTES)
    found = targets_of(
        {
            "flat": flat, "part": flat[:100], "alone": alone, "tied": alone[:0],
            "left": (halves := torch.zeros(2, LEAST_BYTES))[0], "right": halves[1],
            "strided": torch.zeros(LEAST_BYTES, 2)[:, 0], "few": torch.zeros(3), "value": 3,
            "conj": torch.zeros(LEAST_BYTES, dtype=torch.complex64).conj(), "meta": torch.zeros(9**7, device="meta"),
        }
    )  # fmt: skip
    assert found.keys() == {"alone", "left", "right"}


def test_unverified_bytes_never_get_into_live_memory(tmp_path):
    old, new = state(2), state(1)
    save(tmp_path, s1=new)
    damage(tmp_path / "step-1", "b", at=2 * PIECE)
    live = Flat({name: tensor.clone() for name, tensor in old.items()})
    with Checkpointer(tmp_path, group=SINGLE) as ckpt, pytest.raises(IntegrityError, match="'b', piece"):
        ckpt.restore(live)
    for name, tensor in live.state.items():
        assert bool(torch.where(tensor == new[name], True, tensor == old[name]).all())
    assert live.loaded is None


def test_an_older_checkpoint_covers_what_was_filled(tmp_path):
    save(tmp_path, s1=state(1), s2=state(2))
    damage(tmp_path / "step-2", "d", at=LARGE)
    live = Flat(state(3))
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        assert ckpt.restore(live).step == 1
        assert equal(live.loaded, state(1))
        ckpt.save(3, live).wait()


def test_what_the_older_one_has_not_is_said(tmp_path):
    save(tmp_path, s1={name: tensor for name, tensor in state(1).items() if name != "d"}, s2=state(2))
    damage(tmp_path / "step-2", "b", at=0)
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        with pytest.raises(IntegrityError, match="had 'd' and did not verify, and step 1 does not have it"):
            ckpt.restore(live := Flat(state(3)))
        assert live.loaded is None


def test_a_torn_state_is_not_saved_until_it_is_whole(tmp_path):
    save(tmp_path, s1=state(1), s2=state(2))
    damage(tmp_path / "step-2", "d", at=0)
    live = Flat(state(3))
    with Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(9)) as ckpt:
        with pytest.raises(IntegrityError):
            ckpt.restore(live, step=2)
        with pytest.raises(StateError, match="restore of step 2 failed in the middle"):
            ckpt.save(3, live)
        assert ckpt.steps() == [1, 2]
        ckpt.restore(live, step=1)
        ckpt.save(3, live).wait()
    assert equal(live.loaded, state(1))
