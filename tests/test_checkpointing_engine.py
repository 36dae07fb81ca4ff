"""The engine behind a save: what it keeps from save to save, what it does at the same time, and providers that err."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, Cost, Mutability, Place
from checkpointing.errors import StateError
from checkpointing.pieces import PIECE_BYTES
from checkpointing.save import Saver
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, assorted, same

LARGE = 3 * PIECE_BYTES // 4


class Made:
    """A provider of a user's own: `shape` numbers of four bytes, which `chunks` makes."""

    place, dtype, encoding, global_shape, offset = Place.HOST, "I32", None, None, None

    def __init__(self, mutability: Mutability, shape: tuple[int, ...], chunks: Any, cost: Cost = Cost.COMPUTE) -> None:
        self.mutability, self.shape, self._chunks, self.cost = mutability, shape, chunks, cost

    def chunks(self) -> Iterator[bytes]:
        yield from self._chunks()


def test_what_takes_work_is_made_while_bytes_are_written(tmp_path, monkeypatch):
    """Each waits for the other to have begun: one after the other would never end."""
    making, writing, write = threading.Event(), threading.Event(), LocalStorage.write_at

    def gated(self: LocalStorage, fd: int, data: memoryview, offset: int) -> None:
        writing.set()
        assert making.wait(20)
        write(self, fd, data, offset)

    def chunks() -> Iterator[bytes]:
        making.set()
        assert writing.wait(20)
        yield (7).to_bytes(4, "little")

    monkeypatch.setattr(LocalStorage, "write_at", gated)
    state = {"large": torch.arange(float(LARGE)), "made": Made(Mutability.STEP, (1,), chunks)}
    with Checkpointer(tmp_path, group=SINGLE, timeout_s=60) as ckpt:
        ckpt.save(1, Flat(state)).wait()
        ckpt.restore(back := Flat({}))
    assert same(back.loaded, state | {"made": torch.tensor([7], dtype=torch.int32)})


def test_what_stays_is_planned_and_described_once(tmp_path, monkeypatch):
    described: list[str] = []
    report = Saver._report

    def spied(saver, job):
        told = report(saver, job)
        described.extend(spec.name for spec in told["specs"] or ())
        return told

    monkeypatch.setattr(Saver, "_report", spied)
    state = assorted(1)
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        kept = []
        for step in (1, 2, 3):
            ckpt.save(step, Flat(state)).wait()
            saver = ckpt._engine._saver
            kept.append([saver._plan, *saver._layouts.values(), *saver._fills.values()])
        assert len(described) == len([one for one in state.values() if torch.is_tensor(one)])
        assert all(left is right for left, right in zip(kept[0], kept[2], strict=True))
        ckpt.save(4, Flat(state | {"more": torch.ones(3)})).wait()
        assert "more" in described
        ckpt.restore(back := Flat({}))
    assert same(back.loaded, state | {"more": torch.ones(3)})


@pytest.mark.parametrize("mutability", [Mutability.STEP, Mutability.ANYTIME])
@pytest.mark.parametrize("cost", [Cost.COMPUTE, Cost.VIEW])
@pytest.mark.parametrize("given", [0, 5, 7])
def test_a_provider_that_gives_other_bytes_than_it_says_fails_the_save(tmp_path, mutability, cost, given):
    """Else what a buffer held before would be saved, and verified ever after."""
    liar = Made(mutability, (2, 3), lambda: [bytes(4)] * given, cost)
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(1, Flat({"a": torch.ones(LARGE)})).wait()
        with pytest.raises(StateError, match=rf"provider of 'b' gave {4 * given} bytes; I32 of shape \[2, 3\] has 24"):
            ckpt.save(2, Flat({"b": liar})).wait()
        assert ckpt.steps() == [1]


@pytest.mark.parametrize("mutability", [Mutability.STEP, Mutability.ANYTIME])
def test_a_provider_that_raises_fails_the_save_and_is_the_cause(tmp_path, mutability):
    def chunks() -> Iterator[bytes]:
        yield bytes(4)
        raise KeyError("gone")

    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        with pytest.raises(CheckpointError, match="save of step 1 failed: KeyError: 'gone'"):
            ckpt.save(1, Flat({"b": Made(mutability, (6,), chunks)})).wait()
        ckpt.save(2, Flat({"b": 1})).wait()
