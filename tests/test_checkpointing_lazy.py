"""Saves run beside training, and hold the state of the moment of the call."""

import threading
import time

import pytest
import torch
from torch.optim import SGD, AdamW

from checkpointing import (
    SINGLE,
    Checkpointer,
    CheckpointError,
    Cost,
    Mutability,
    ObjectProvider,
    Place,
    TensorProvider,
)
from checkpointing.errors import PassedOverError, StateError
from checkpointing.pieces import PIECE_BYTES
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, same

BIG = 3 * PIECE_BYTES // 4 + 5  # elements of 4 bytes: three pieces and a bit
SETTINGS = {"group": SINGLE, "timeout_s": 20, "staging_bytes": 32 * 2**20}


class Training:
    """A model of one weight, of several pieces, and an optimizer that has stepped."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(BIG))
        self.optimizer = AdamW([self.weight], lr=0.1)
        self.buffer = torch.zeros(BIG)
        self.step()

    def step(self) -> None:
        self.weight.grad = torch.ones_like(self.weight)
        self.optimizer.step()

    def state_dict(self):
        slots = self.optimizer.state[self.weight]
        return {"weight": self.weight.detach(), "buffer": self.buffer, **{f"optim.{k}": v for k, v in slots.items()}}

    def load_state_dict(self, state):
        self.loaded = state

    def copy(self):
        return {name: value.clone() for name, value in self.state_dict().items()}


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until it is set."""
    opened, write = threading.Event(), LocalStorage.write_at

    def gated(self, *args):
        assert opened.wait(20)
        write(self, *args)

    monkeypatch.setattr(LocalStorage, "write_at", gated)
    yield opened
    opened.set()


def restored(path, step=None):
    with Checkpointer(path, group=SINGLE) as ckpt:
        flat = Flat({})
        assert ckpt.restore({"run": flat}, step) is not None
    return flat.loaded


def test_a_step_behind_the_save_waits_and_changes_nothing_that_is_saved(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        run, expected = Training(), {}
        for step in range(1, 4):
            expected[step] = run.copy()
            ckpt.save(step, {"run": run})
            run.buffer += 1  # no optimizer's: copied inside of save
            run.step()
    for step, state in expected.items():
        assert same(restored(tmp_path, step), state)
    assert not same(expected[1], expected[2])


def test_save_returns_before_anything_is_written_and_the_fence_before_anything_is_durable(tmp_path, gate):
    with Checkpointer(tmp_path, **{**SETTINGS, "staging_bytes": 96 * 2**20}) as ckpt:
        run = Training()
        before = run.copy()
        handle = ckpt.save(1, {"run": run})
        assert handle.progress.written_bytes == 0
        run.step()  # the slabs hold all of it
        handle.staged(0)
        assert not handle.progress.done
        with pytest.raises(
            CheckpointError, match=r"save of step 1 is not durable after 0\.\d s; 0 of \d+ bytes are wri"
        ):
            handle.wait(0.01)
        gate.set()
        assert handle.wait(20) == tmp_path / "step-1"
    assert same(restored(tmp_path), before)


def test_memory_put_into_a_tensor_while_it_is_saved_is_not_what_is_saved(tmp_path, gate):
    """As by `model.to(...)`; what was there is kept until it is copied."""
    train = Training()
    train.weight.data = torch.randn(8 * BIG)  # more than the buffers hold
    train.optimizer.state.clear()
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        train.step()
        expected = train.weight.detach().clone()
        handle = ckpt.save(1, {"run": Flat({"weight": train.weight})})
        train.weight.data = torch.zeros(3)
        gate.set()
        handle.wait()
    assert same(restored(tmp_path)["weight"], expected)


def test_the_fence_waits_while_slabs_are_short(tmp_path, gate):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        run = Training()
        run.buffer = run.buffer[:1]
        before = run.copy()
        ckpt.save(1, {"run": run})
        threading.Timer(0.3, gate.set).start()
        begun = time.monotonic()
        run.step()
        assert gate.is_set()
        assert time.monotonic() - begun > 0.1
    assert same(restored(tmp_path), before)


def test_memory_stays_in_its_budget(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        ckpt.save(1, {"run": Flat({"a": torch.randn(16 * PIECE_BYTES // 4)})}).wait()
        ring = ckpt._engine.ring
        # Fewer where the disk was faster than the copies.
        assert 0 < ring._mapped <= ring.num_slabs == 24 * 2**20 // PIECE_BYTES
        assert len(ring._free) == ring._mapped


def test_what_no_optimizer_is_known_to_step_is_copied_inside_of_save(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        state = {"ema": torch.ones(BIG), "lr": torch.tensor(0.5), "turned": torch.randn(300, 200).t(), "value": [1]}
        before = {
            key: value.clone() if isinstance(value, torch.Tensor) else list(value) for key, value in state.items()
        }
        ckpt.save(1, {"run": Flat(state)})
        state["ema"] += 1
        state["lr"] += 1
        state["turned"] += 1
        state["value"].append(2)
    assert same(restored(tmp_path), before)


def test_a_fence_by_hand(tmp_path):
    weight = torch.ones(BIG)
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        ckpt.save(1, {"run": Flat({"w": TensorProvider(weight, Mutability.STEP)})})
        ckpt.fence()
        weight += 1
    assert same(restored(tmp_path), {"w": torch.ones(BIG)})


def test_the_hook_goes_with_the_checkpointer(tmp_path):
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    before = len(_global_optimizer_pre_hooks)
    ckpt = Checkpointer(tmp_path, **SETTINGS)
    assert len(_global_optimizer_pre_hooks) == before + 1
    ckpt.close()
    assert len(_global_optimizer_pre_hooks) == before


def test_a_failed_save_does_not_stop_the_step_and_is_told_afterwards(tmp_path, monkeypatch):
    def broken(self, fd, data, offset):
        raise OSError(5, "broken")

    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        run = Training()
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "write_at", broken)
            ckpt.save(1, {"run": run})
            run.step()
            assert ckpt._engine.idle(20)
        run.step()
        with pytest.raises(CheckpointError, match=r"save of step 1 failed: OSError: .*broken"):
            ckpt.save(2, {"run": run})
        ckpt.save(3, {"run": run}).wait()
    assert ckpt.steps() == [3]


def test_checking_names_what_changed_outside_of_a_step(tmp_path, gate):
    with Checkpointer(tmp_path, **SETTINGS, check=True) as ckpt:
        state = {name: TensorProvider(torch.ones(4 * BIG), Mutability.STEP) for name in ("good", "torn")}
        handle = ckpt.save(1, {"run": Flat(state)})
        state["torn"].tensor[-1] += 1
        gate.set()
        with pytest.raises(StateError, match=r"'run\.torn' changed while being saved, outside of an optimizer's step"):
            handle.wait(20)
        ckpt.save(2, {"run": Flat(state)}).wait()


def test_busy_wait(tmp_path, gate):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        handles = [ckpt.save(step, {"run": Flat({"a": step})}) for step in (1, 2)]
        assert not any(handle.progress.done for handle in handles)
        gate.set()
        assert [handle.wait(20).name for handle in handles] == ["step-1", "step-2"]


def test_busy_skip(tmp_path, gate):
    with Checkpointer(tmp_path, **SETTINGS, busy="skip") as ckpt:
        first, second = (ckpt.save(step, {"run": Flat({"a": step})}) for step in (1, 2))
        assert second.skipped == "save of step 2 was skipped: save of step 1 is not durable yet"
        with pytest.raises(PassedOverError, match="step 2 was skipped"):
            second.wait()
        gate.set()
        first.wait(20)
        assert first.skipped is None
        ckpt._engine.idle(20)
        ckpt.save(3, {"run": Flat({"a": 3})}).wait(20)
    assert ckpt.steps() == [1, 3]


def test_busy_replace(tmp_path, gate):
    with Checkpointer(tmp_path, **SETTINGS, busy="replace") as ckpt:
        first = ckpt.save(1, {"run": Flat({"a": torch.ones(BIG)})})
        second = ckpt.save(2, {"run": Flat({"a": 2})})
        gate.set()
        assert second.wait(20).name == "step-2"
        with pytest.raises(PassedOverError, match="save of step 1 failed: save of step 2 replaces it"):
            first.wait()
    assert ckpt.steps() == [2]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_rate_limit_holds(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS, max_bytes_per_s=20e6) as ckpt:
        begun = time.monotonic()
        ckpt.save(1, {"run": Flat({"a": torch.ones(4 * PIECE_BYTES // 4)})}).wait(20)
        assert time.monotonic() - begun > 3 * PIECE_BYTES / 20e6  # the first piece goes at once


class Squares:
    """A provider of a user's own: numbers made in the background."""

    place, mutability, cost, dtype = Place.HOST, Mutability.STEP, Cost.COMPUTE, "I32"
    shape, global_shape, offset, encoding = (6,), None, None, None

    def chunks(self):
        buffer = bytearray(4)  # the same for every chunk
        for number in range(6):
            buffer[:] = (number * number).to_bytes(4, "little")
            yield memoryview(buffer)


def test_objects_and_providers_of_a_users_own(tmp_path):
    value = {"tuple": (1, (2, b"x")), 5: [None, True, 1.5, 2**70, -(2**70)], "text": "\u00e9", "empty": {}}
    state = {
        "late": ObjectProvider(value, Mutability.STEP),
        "now": ObjectProvider(value),
        "squares": Squares(),
        "w": torch.arange(5.0),
    }
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"run": Flat(state)})
            ckpt.fence()
            value["more"] = step
    first, second = restored(tmp_path, 1), restored(tmp_path, 2)
    assert "more" not in first["late"]
    assert first["late"] == first["now"] == {key: one for key, one in value.items() if key != "more"}
    assert second["now"]["more"] == 1
    assert same(first["squares"], torch.tensor([0, 1, 4, 9, 16, 25], dtype=torch.int32))
    with (
        pytest.raises(StateError, match="holds a set; an object is made of"),
        Checkpointer(tmp_path, **SETTINGS) as ckpt,
    ):
        ckpt.save(3, {"run": Flat({"o": ObjectProvider({"a": {1}})})})


def test_many_small_tensors_of_many_kinds_in_any_order(tmp_path):
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    state = {f"t{n}": torch.arange(n % 50).to(kinds[n % 7]) for n in range(500)} | {"large": torch.arange(50_000.0)}
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        for step in (1, 2, 3):
            state["t499"] = state["t499"] + 1  # another memory: the plan is made again
            state["t1"].add_(1)
            ckpt.save(step, {"run": Flat(state)}).wait()
            assert same(restored(tmp_path, step), state)


def test_a_plan_is_kept_while_structure_and_memory_stay(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        run = Training()
        ckpt.save(1, {"run": run}).wait()
        run.step()
        ckpt.save(2, {"run": run}).wait()
        kept = ckpt._engine._snapshots._structure
        run.step()
        ckpt.save(3, {"run": run}).wait()
        assert ckpt._engine._snapshots._structure is kept
        run.weight.data = run.weight.data.clone()
        ckpt.save(4, {"run": run}).wait()
        assert ckpt._engine._snapshots._structure is not kept
    assert same(restored(tmp_path, 4), run.copy())


def test_an_optimizer_that_goes_away_owns_nothing(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        weight = torch.nn.Parameter(torch.ones(BIG))
        optimizer = SGD([weight], lr=1.0)
        weight.grad = torch.ones(BIG)
        optimizer.step()
        ckpt.save(1, {"run": Flat({"w": weight.detach()})}).wait()
        assert ckpt._engine._snapshots._structure.urgent == frozenset()
        del optimizer
        ckpt.save(2, {"run": Flat({"w": weight.detach()})}).wait()
        assert ckpt._engine._snapshots._structure.urgent == {"run.w"}


def test_unchanged_tensors_are_links_and_live_as_long_as_a_checkpoint_needs_them(tmp_path):
    base, head = torch.arange(200_000.0), torch.zeros(100_000)
    state = {"base": TensorProvider(base, Mutability.NEVER), "settles": torch.ones(100_000), "head": head, "n": 0}
    with Checkpointer(tmp_path, **SETTINGS, incremental=True) as ckpt:
        sizes = []
        for step in range(1, 7):
            state["n"], _ = step, head.add_(1)
            ckpt.save(step, {"run": Flat(state)}).wait()
            sizes.append((tmp_path / f"step-{step}" / "rank-00000.safetensors").stat().st_size)
        assert ckpt._engine.idle(20)
    assert ckpt.steps() == [4, 5, 6]
    assert sizes[0] - sizes[1] >= base.nbytes + 400_000  # one is declared never to change, the other found not to
    assert sizes[1:] == [sizes[1]] * 5
    names = {path.name for path in (tmp_path / "step-6").glob("*.safetensors")}
    assert names == {"rank-00000.safetensors", "rank-00000.from-1.safetensors"}
    assert same(restored(tmp_path, 4)["head"], torch.full((100_000,), 4.0))
    assert same(restored(tmp_path, 6), {"base": base, "settles": state["settles"], "head": head, "n": 6})


def test_a_request_is_seen_and_taken_away(tmp_path):
    with Checkpointer(tmp_path, **SETTINGS) as ckpt:
        assert not ckpt.requested()
        (tmp_path / "request").touch()
        assert ckpt.requested()
        ckpt.save(1, Flat({"a": 1})).wait()
        ckpt._engine.idle(20)
        assert not ckpt.requested()


def test_a_save_in_flight_is_finished_by_close_or_given_up_and_either_is_said(tmp_path, gate, caplog):
    caplog.set_level("INFO", "checkpointing")
    ckpt = Checkpointer(tmp_path, **SETTINGS)
    ckpt.save(1, Flat({"a": torch.ones(3)}))
    threading.Timer(0.2, gate.set).start()
    ckpt.close()
    assert "save of step 1: finished on the way out" in caplog.text
    gate.clear()
    ckpt = Checkpointer(tmp_path, **{**SETTINGS, "timeout_s": 0.5})
    handle = ckpt.save(2, Flat({"a": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="save of step 2 failed"):
        ckpt.close()
    assert handle.is_over
    assert ckpt.steps() == [1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"busy": "later"}, "busy is 'later'; choose one of wait, skip, replace"),
        ({"staging_bytes": 1}, "staging_bytes is 1; it must be at least"),
        ({"flush_threads": 0}, "flush_threads is 0"),
        ({"hurried_threads": 1}, "flush_threads is 2 and hurried_threads 1"),
        ({"max_bytes_per_s": 0}, "max_bytes_per_s is 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, text):
    with pytest.raises(CheckpointError, match=text):
        Checkpointer(tmp_path, group=SINGLE, **settings)


def test_a_save_given_up_leaves_no_writer_that_waits_for_its_turn(tmp_path):
    before = set(threading.enumerate())
    ckpt = Checkpointer(tmp_path, group=SINGLE, timeout_s=1.0, max_bytes_per_s=10_000.0)  # a buffer: seven minutes
    ckpt.save(1, Flat({"a": torch.ones(4_000_000)}))
    with pytest.raises(CheckpointError):
        ckpt.close()
    assert not [one for one in {*threading.enumerate()} - before if one.name.startswith("checkpoint-flush")]
