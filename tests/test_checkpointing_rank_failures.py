"""Several ranks, and one of them fails, differs, lags, stays away or dies: one error on all, in time."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.control import Outcome
from checkpointing.control_store import StoreControl
from checkpointing.errors import IntegrityError, RankError, SaveError, StateError
from checkpointing.folder import Folder
from checkpointing.storage.local import LocalStorage
from tests.flat_states import Flat, same
from tests.spawn import run_ranks


def own_and_shared(rank: int) -> dict:
    return {"w": torch.arange(2000.0), f"rng.{rank}": torch.full((3,), rank), "note": "shared"}


def save_each(info, path, states, step):
    """Return what the save raised, on this rank, and whether the checkpointer still works."""
    with Checkpointer(path, timeout_s=20) as ckpt:
        with pytest.raises(CheckpointError) as caught:
            ckpt.save(step, states[info.rank]).wait()
        ckpt.save(99, Flat({"a": 1})).wait()
        return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        (
            {"a": torch.ones(2)},
            {"a": torch.ones(3)},
            "tensor 'a' is F32 [2] on rank 0 and F32 [3] on rank 1; ",
        ),
        ({"a": 1}, {"a": 2}, r"value 'a' is 1 on rank 0 and 2 on rank 1; ranks that save the same name"),
        ({"a": 1}, {"a": object()}, r"rank 1: 'a' is of type object; save tensors and JSON values"),
        ({"a": (1,)}, {"a": (1,)}, r"every rank: 'a' is of type tuple; make it a list"),
    ],
)
def test_refusals_are_the_same_error_on_every_rank(tmp_path, left, right, text):
    first, second = run_ranks(save_each, 2, tmp_path, [Flat(left), Flat(right)], 4)
    assert first == second
    assert first[0] is StateError
    assert f"save of step 4 failed: {text}" in first[1]


class Unready(Flat):
    def state_dict(self):
        raise RuntimeError("the state is not ready")


class Interrupted(Flat):
    def state_dict(self):
        raise KeyboardInterrupt


def rank_interrupted(info, path):
    with Checkpointer(path, timeout_s=20) as ckpt:
        told = ""
        try:
            ckpt.save(1, Interrupted({}) if info.rank else Flat({"a": 1})).wait()
        except (CheckpointError, KeyboardInterrupt) as error:
            told = f"{type(error).__name__}: {error}"
        ckpt.save(2, Flat({"a": 2})).wait()
        return told, ckpt.steps()


def test_a_rank_that_is_interrupted_tells_the_others_and_stays_in_step_with_them(tmp_path):
    first, second = run_ranks(rank_interrupted, 2, tmp_path)
    assert first == ("SaveError: save of step 1 failed: rank 1: interrupted by KeyboardInterrupt", [2])
    assert second == ("KeyboardInterrupt: ", [2])


def test_a_rank_that_fails_staging_fails_the_save_on_all(tmp_path):
    start = time.monotonic()
    first, second = run_ranks(save_each, 2, tmp_path, [Flat({"a": 1}), Unready({})], 4)
    assert time.monotonic() - start < 20
    assert first == second == (SaveError, "save of step 4 failed: rank 1: RuntimeError: the state is not ready")


def fail_writing(info, path):
    with Checkpointer(path, timeout_s=20) as ckpt, pytest.MonkeyPatch.context() as patch:
        ckpt.save(1, {"run": Flat(own_and_shared(info.rank))}).wait()
        if info.rank == 1:
            patch.setattr(LocalStorage, "write_at", disk_full)
        handle = ckpt.save(2, {"run": Flat(own_and_shared(info.rank))})
        with pytest.raises(SaveError) as caught:
            handle.wait()
        patch.undo()
        steps = ckpt.steps()
        leftovers = [path.name for path in Path(path).glob("*.tmp-*")]
        ckpt.save(2, {"run": Flat(own_and_shared(info.rank))}).wait()
        return str(caught.value), steps, leftovers, ckpt.latest()


def disk_full(self, fd, data, offset):
    raise OSError(28, "No space left on device")


def test_a_rank_whose_disk_is_full_fails_the_save_on_all(tmp_path):
    text = "save of step 2 failed: rank 1: OSError: [Errno 28] No space left on device"
    assert run_ranks(fail_writing, 2, tmp_path) == [(text, [1], [], 2)] * 2


def fail_unheard(info, path):
    """Only rank 0 waits, and hears of it; rank 1 hears at its next save, which fails on both; then all is well."""
    with Checkpointer(path, timeout_s=20) as ckpt:
        heard = []
        for step in (1, 2, 3):
            try:
                handle = ckpt.save(step, Flat({"a": 1}) if (step, info.rank) != (1, 1) else Unready({}))
                if info.rank == 0 or step == 3:
                    handle.wait()
                while not handle.is_over:  # else rank 1 may be at its next save before it knows
                    time.sleep(0.001)
            except CheckpointError as error:
                heard.append((step, str(error)))
        return heard


def test_a_rank_that_hears_late_does_not_hang_the_others(tmp_path):
    first, second = run_ranks(fail_unheard, 2, tmp_path)
    failure = "save of step 1 failed: rank 1: RuntimeError: the state is not ready"
    assert first == [(1, failure), (2, f"save of step 2 failed: rank 1: not begun, as an earlier one: {failure}")]
    assert second == [(2, failure)]


def refuse_to_load(info, path):
    class Picky(Flat):
        def load_state_dict(self, state_dict):
            if info.rank == 1:
                raise ValueError("another model")

    with Checkpointer(path, timeout_s=20) as ckpt:
        ckpt.save(1, Flat({"a": 1})).wait()
        with pytest.raises(CheckpointError) as caught:
            ckpt.restore(Picky({}))
        return str(caught.value), repr(caught.value.__cause__)


def test_a_rank_that_refuses_what_it_is_given_tells_the_others(tmp_path):
    first, second = run_ranks(refuse_to_load, 2, tmp_path)
    assert first == ("restore failed: rank 1: ValueError: another model", "None")
    assert second == (first[0], "ValueError('another model')")


def go_silent(info, path):
    """Rank 2 does not take part in the save of step 2."""
    ckpt = Checkpointer(path, timeout_s=1)
    ckpt.save(1, Flat({"a": info.world_size})).wait()
    dist.barrier()
    start = time.monotonic()
    text = ""
    if info.rank != 2:
        with pytest.raises(RankError) as caught:
            ckpt.save(2, Flat({"a": 1})).wait()
        text = str(caught.value)
        assert time.monotonic() - start < 15
    dist.barrier()
    steps = ckpt.steps()
    ckpt.close()
    return text, steps


def test_a_silent_rank_is_named_within_the_deadline(tmp_path):
    first, second, _ = run_ranks(go_silent, 3, tmp_path)
    assert first == second == ("save of step 2 failed: rank 2 did not report in time", [1])


def work_long(info, path):
    """Rank 1 takes three deadlines to write, and gives signs of life."""
    settings = {"flush_threads": 1, "hurried_threads": 1}
    with Checkpointer(path, timeout_s=1, **settings) as ckpt, pytest.MonkeyPatch.context() as patch:
        if info.rank == 1:
            write = LocalStorage.write_at

            def slow(self, fd, data, offset):
                time.sleep(0.5)
                write(self, fd, data, offset)

            patch.setattr(LocalStorage, "write_at", slow)
        ckpt.save(1, Flat({f"own.{info.rank}": torch.ones(6 * 2**20)})).wait()  # 7 writes, one behind the other
        return ckpt.steps()


def test_a_slow_rank_that_works_is_waited_for(tmp_path):
    assert run_ranks(work_long, 2, tmp_path) == [[1], [1]]


def different_calls(info, path):
    with Checkpointer(path, timeout_s=5) as ckpt:
        with pytest.raises(RankError) as caught:
            ckpt.save(1 + info.rank, Flat({"a": 1})).wait()
        return str(caught.value)


def test_ranks_in_different_calls_are_told(tmp_path):
    first, second = run_ranks(different_calls, 2, tmp_path)
    assert first == second
    assert first == (
        "save of step 1 failed: rank 1 is in: save of step 2; every rank must make the same calls in the same order"
    )


def different_paths(info, path):
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(Path(path) / str(info.rank), timeout_s=5)
    return str(caught.value)


def test_ranks_must_mean_the_same_folder(tmp_path):
    texts = run_ranks(different_paths, 2, tmp_path)
    assert (
        texts
        == [f"opening the checkpointer failed: the folder is {tmp_path}/0 on rank 0 and {tmp_path}/1 on rank 1"] * 2
    )


def die_in_save(info, path, victim, way):
    ckpt = Checkpointer(path, timeout_s=2, keep=KeepLast(1))
    ckpt.save(1, Flat({"a": torch.ones(5)})).wait()
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    if info.rank == victim:
        os.kill(os.getpid(), way)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ckpt.save(2, Flat({"a": torch.ones(5)})).wait()
    assert time.monotonic() - start < 15
    Path(path, f"told-{info.rank}").write_text(str(caught.value))
    os.kill(pids[victim], signal.SIGKILL)
    os._exit(0)


@pytest.mark.parametrize(("victim", "way"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_dead_or_stopped_rank_is_named_and_the_old_checkpoint_stays(tmp_path, victim, way):
    with pytest.raises(AssertionError):  # no rank returns
        run_ranks(die_in_save, 2, tmp_path, victim, way, fresh=True)
    text = (tmp_path / f"told-{1 - victim}").read_text()
    assert text.startswith("save of step 2 failed: rank " + str(victim)), text
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        back = Flat({})
        assert ckpt.restore(back).step == 1
    assert same(back.loaded, {"a": torch.ones(5)})


def see_another_folder(info, path):
    with Checkpointer(path / "run", timeout_s=20) as ckpt, pytest.MonkeyPatch.context() as patch:
        ckpt.save(1, Flat({"a": 1})).wait()
        if info.rank == 1:
            with Checkpointer(path / "other", group=SINGLE) as other:
                other.save(1, Flat({"a": 2})).wait()
            patch.setattr(Folder, "at", lambda self, step: path / "other" / "step-1")
        back = Flat({})
        with pytest.raises(IntegrityError) as caught:
            ckpt.restore(back)
        return str(caught.value), back.loaded


def test_a_rank_that_sees_another_folder_under_the_same_path_loads_nothing(tmp_path):
    first, second = run_ranks(see_another_folder, 2, tmp_path)
    assert first == second
    assert first[1] is None
    assert "restore failed: rank 1: " in first[0]
    assert "is another checkpoint on rank 0; is this a shared folder?" in first[0]


def live_in_another_call(info):
    """Rank 1 has given the first call up; what it does in the second is no sign of life in the first."""
    control = StoreControl(dist.group.WORLD, 0.5)
    start = time.monotonic()
    control.begin("first")
    if info.rank == 1:
        control.begin("second")
        while time.monotonic() - start < 4:
            control.alive()
            time.sleep(0.05)
        waited, answer = 0.0, None
    else:
        answer = control.exchange("only", Outcome("first", body={}), lambda bodies: bodies).error
        waited = time.monotonic() - start
    dist.barrier()
    control.close()
    return answer, waited < 3


def test_signs_of_life_count_only_in_their_own_call():
    assert run_ranks(live_in_another_call, 2)[0] == ("first failed: rank 1 did not report in time", True)


def saves_and_fails(path):
    with Checkpointer(path, timeout_s=600) as ckpt:
        ckpt.save(1, Flat({"a": torch.ones(3)}))
        raise ValueError("a mistake of mine")


def leaves_by_an_error(info, path):
    """Rank 0 leaves the block by an error while rank 1, which it saves with, is silent; what it has said, and took."""
    said, begun = [], time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpointing.checkpointer._AFTER_ERROR_S", 0.5)
        patch.setattr("checkpointing.engine._GOODBYE_S", 0.5)
        patch.setattr(logging.getLogger("checkpointing"), "error", lambda text, *args: said.append(text % args))
        if info.rank == 0:
            with pytest.raises(ValueError, match="of mine"):
                saves_and_fails(path)
        else:
            ckpt = Checkpointer(path, timeout_s=600)
        took = time.monotonic() - begun
        dist.barrier()
        if info.rank:
            ckpt.close()
    return said, took


def test_an_error_is_told_before_a_silent_rank_is_waited_for(tmp_path):
    (said, took), _ = run_ranks(leaves_by_an_error, 2, str(tmp_path))
    assert said[0] == "ValueError: a mistake of mine; ending within 0.5 s the save in flight"
    assert "rank 1 did not report in time" in said[-1]
    assert took < 60


def save_or_restore(info, path):
    with Checkpointer(path, timeout_s=5) as ckpt:
        with pytest.raises(RankError, match="save of step 1 failed: rank 1 is in: restore; every rank must make the"):
            ckpt.save(1, Flat({"a": 1})).wait() if info.rank == 0 else ckpt.restore(Flat({"a": 1}))
        return ckpt.save(2, Flat({"a": 1})).wait().name


def test_a_rank_that_saves_and_one_that_restores_are_told(tmp_path):
    assert run_ranks(save_or_restore, 2, tmp_path) == ["step-2"] * 2
