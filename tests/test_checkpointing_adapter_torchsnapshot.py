"""torchsnapshot's app_state, taken by torchsnapshot and by us: the same comes back."""

import copy

import numpy as np
import pytest
import torch
import torchsnapshot

from checkpointing import SINGLE, Checkpointer
from checkpointing.adapters.torchsnapshot import AppState
from checkpointing.convert import save_source
from checkpointing.errors import CheckpointError, StateError
from checkpointing.formats import open_source, write_target
from tests.flat_states import same
from tests.spawn import run_ranks


def made(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 2))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    progress = torchsnapshot.StateDict(step=seed, note=(1, None), seen={3: b"x", "y": [torch.ones(2)]})
    return {
        "model": model, "optim": optimizer, "scheduler": scheduler, "progress": progress,
        "rng": torchsnapshot.RNGState(),
    }  # fmt: skip


def step(app):
    app["model"](torch.randn(8, 40)).square().mean().backward()
    app["optim"].step()
    app["optim"].zero_grad()
    app["scheduler"].step()
    app["progress"]["step"] += 1
    return torch.cat([p.detach().reshape(-1) for p in app["model"].parameters()])


def rank_runs(info, root, library):
    """Save after a step while training goes on; restore into others; the next steps of both, bit by bit."""
    app = made(1)
    step(app)
    if library == "ours":
        with Checkpointer(root) as checkpoints:
            state = AppState(app, per_rank=["rng"], rank=info.rank)
            torch.manual_seed(50 + info.rank)
            checkpoints.save(1, state)
            ours = [step(app), step(app)]
            checkpoints.fence()
    else:
        torch.manual_seed(50 + info.rank)
        torchsnapshot.Snapshot.take(root, app, replicated=["model/**", "optim/**"])
        ours = [step(app), step(app)]
    other = made(2)
    step(other)
    if library == "ours":
        with Checkpointer(root) as checkpoints:
            assert checkpoints.restore(AppState(other, per_rank=["rng"], rank=info.rank)).step == 1
    else:
        torchsnapshot.Snapshot(root).restore(other)
    assert other["progress"]["note"] == (1, None)
    assert other["progress"]["seen"][3] == b"x"
    assert other["progress"]["step"] == 2
    again = [step(other), step(other)]
    assert same(ours, again)
    return again[-1]


@pytest.mark.parametrize("library", ["ours", "torchsnapshot"])
def test_what_is_saved_while_training_goes_on_trains_on_bit_by_bit(tmp_path, library):
    ranks = run_ranks(rank_runs, 2, str(tmp_path / "run"), library)
    assert not torch.equal(*ranks)  # each had random numbers of its own


def test_a_snapshot_becomes_a_checkpoint_and_one_again(tmp_path):
    app = made(3)
    step(app)
    torchsnapshot.Snapshot.take(str(tmp_path / "theirs"), app)
    save_source(open_source(tmp_path / "theirs"), tmp_path / "run", 1, lambda _: None)
    write_target("torchsnapshot", open_source(tmp_path / "run"), tmp_path / "back")
    other = {"model": made(4)["model"]}
    torchsnapshot.Snapshot(str(tmp_path / "back")).restore(other)
    assert same(dict(other["model"].state_dict()), dict(app["model"].state_dict()))


def test_what_is_saved_here_becomes_a_snapshot_that_torchsnapshot_restores(tmp_path):
    app = made(3)
    del app["rng"]
    step(app)
    with Checkpointer(tmp_path / "run", group=SINGLE) as checkpoints:
        checkpoints.save(1, AppState(app)).wait()
    write_target("torchsnapshot", open_source(tmp_path / "run"), tmp_path / "theirs")
    other = made(4)
    del other["rng"]
    step(other)
    torchsnapshot.Snapshot(str(tmp_path / "theirs")).restore(other)
    torch.manual_seed(8)
    ours = step(app)
    torch.manual_seed(8)
    assert same(step(other), ours)
    assert other["progress"]["note"] == (1, None)


def test_what_does_not_fit_is_told(tmp_path):
    app = made(1)
    before = copy.deepcopy(app["model"].state_dict())
    with Checkpointer(tmp_path, group=SINGLE) as checkpoints:
        checkpoints.save(1, AppState({"model": made(2)["model"]})).wait()
        with pytest.raises(CheckpointError, match="'progress' was not saved for rank 0; there are: model"):
            checkpoints.restore(AppState({"model": app["model"], "progress": app["progress"]}))
    assert same(dict(app["model"].state_dict()), dict(before))
    given = torchsnapshot.StateDict
    for clash in (
        {"a": given(b={"c": torch.ones(1)}), "a.b": given(c=torch.zeros(1))},
        {"tree": given(x=torch.ones(1)), "x": given(n=1)},
    ):
        with pytest.raises(StateError, match="and another key both have something called"):
            AppState(clash).state_dict()
    with pytest.raises(StateError, match="'n' is of type int, without state_dict"):
        AppState({"n": 3})


def test_arrays_of_numpy_come_back_as_they_were_or_are_refused(tmp_path):
    arrays = {
        "scalar": np.array(5.0), "turned": np.arange(6).reshape(2, 3).T, "back": np.arange(3)[::-1],
        "one": np.uint32(7),
        "read-only": np.frombuffer(b"1234", dtype=np.int32), "none": np.zeros((0, 2)),
    }  # fmt: skip
    state, other = torchsnapshot.StateDict(arrays=arrays), torchsnapshot.StateDict(arrays=None)
    with Checkpointer(tmp_path, group=SINGLE) as checkpoints:
        checkpoints.save(1, AppState({"numbers": state})).wait()
        checkpoints.restore(AppState({"numbers": other}))
        for bad in (np.array(["x"]), np.str_("x"), np.array([1], dtype=">i4"), np.ma.array([1, 2], mask=[0, 1])):
            with pytest.raises(StateError, match=r"'numbers\.arrays\.bad' is (a numpy array of|of type numpy)"):
                AppState({"numbers": torchsnapshot.StateDict(arrays={"bad": bad})}).state_dict()
    for name, array in arrays.items():
        back = other["arrays"][name]
        assert (type(back), back.dtype, back.shape) == (type(array), array.dtype, array.shape)
        assert np.array_equal(back, array)
