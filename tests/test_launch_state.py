"""Any optimizer, saved and restored between two steps, goes on bit by bit."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launch.errors import ResumeError
from launch.flat import flatten, roots, unflatten
from launch.rng import seed_rngs
from launch.state import TrainState
from tests.spawn import run_ranks


class Position:
    """A loader, as far as a state is concerned."""

    def __init__(self):
        self.at = 0
        self.refuses = False

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        if self.refuses:
            raise ValueError("other data")
        self.at = state["at"]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.01),
}


def make(optimizer="adamw", *, width=4, dtype=torch.float32, seed=0, **place):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, width), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 11))
    model[3].weight = model[0].weight
    model = model.to(dtype)
    position = Position()
    optim = OPTIMIZERS[optimizer](list(model.parameters()))
    return TrainState(model, optim, position, **place), model, optim, position


def train(model, optim, state, position, steps):
    for _ in range(steps):
        tokens = torch.randint(0, 11, (8,))

        def closure(tokens=tokens):
            optim.zero_grad()
            loss = model(tokens).float().square().mean()
            loss.backward()
            return loss

        optim.step(closure)
        state.step += 1
        position.at += 1


def stored(flat):
    """What a checkpoint makes of it: copies of the tensors, JSON for the rest."""
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else json.loads(json.dumps(value))
        for name, value in flat.items()
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype, name
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_by_bit(optimizer):
    seed_rngs(1)
    state, model, optim, position = make(optimizer)
    train(model, optim, state, position, 2)
    saved = stored(state.state_dict())
    train(model, optim, state, position, 2)
    expected = stored(state.state_dict())

    resumed, model, optim, position = make(optimizer, seed=5)
    seed_rngs(9)
    resumed.load_state_dict(saved)
    assert_same(stored(resumed.state_dict()), saved)
    train(model, optim, resumed, position, 2)
    assert_same(stored(resumed.state_dict()), expected)
    assert (resumed.step, position.at) == (4, 4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_before_the_first_step(optimizer):
    state, *_ = make(optimizer)
    saved = stored(state.state_dict())
    resumed, model, optim, position = make(optimizer, seed=5)
    train(model, optim, resumed, position, 1)
    resumed.load_state_dict(saved)
    assert_same(stored(resumed.state_dict()), saved)


def wrapped_and_bare(info):
    """Save the state of a model that is compiled and in DDP; load it into one that is neither."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
    optim = torch.optim.AdamW(wrapped.parameters())
    wrapped(torch.ones(2, 3)).sum().backward()
    optim.step()
    saved = stored(TrainState(wrapped, optim).state_dict())
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    state = TrainState(other, torch.optim.AdamW(other.parameters()))
    state.load_state_dict(saved)
    assert_same(stored(state.state_dict()), saved)
    return sorted(name for name in saved if name.startswith("model."))


def test_a_model_in_ddp_and_compile_is_saved_by_its_own_names():
    names = ["model.0.bias", "model.0.weight", "model.1.bias", "model.1.weight"]
    assert run_ranks(wrapped_and_bare, 2) == [names, names]


def test_names_are_those_of_parameters_and_tied_ones_occur_once():
    state, model, optim, position = make()
    train(model, optim, state, position, 1)
    names = set(state.state_dict())
    assert {"model.0.weight", "optim.0.weight.exp_avg", "optim.1.bias.step", "loader", "progress"} <= names
    assert {"rng.0.cpu", "rng.0.python", "rng.0.numpy", "optim_groups", "model.2.running_mean"} <= names
    assert not {"model.3.weight", "optim.3.weight.exp_avg"} & names


def test_restoring_keeps_the_tie_and_the_precision_of_slots():
    state, model, optim, position = make(dtype=torch.bfloat16)
    train(model, optim, state, position, 1)
    for slots in optim.state.values():
        slots["exp_avg"] = slots["exp_avg"].float() + 1e-6
    saved = stored(state.state_dict())
    resumed, model, optim, _ = make(dtype=torch.bfloat16, seed=3)
    resumed.load_state_dict(saved)
    assert model[3].weight is model[0].weight
    assert optim.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(optim.state[model[0].weight]["exp_avg"], saved["optim.0.weight.exp_avg"])


def test_random_numbers_continue():
    state, *_ = make()
    seed_rngs(4)
    saved = stored(state.state_dict())
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand(), random.gauss(0, 1))
    seed_rngs(8)
    state.load_state_dict(saved)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(), random.gauss(0, 1)) == expected
    assert state.notes == ()


def test_more_ranks_than_were_saved_are_seeded_and_that_is_said():
    saved = stored(make()[0].state_dict())
    drawn = []
    for seed in (0, 7):
        state, *_ = make(rank=2, world_size=3, seed=seed)
        seed_rngs(seed)
        state.load_state_dict(saved)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
    assert state.notes == ("saved by 1 ranks: the random numbers of ranks [1, 2] start from the seed and the step",)


def broken(saved, **changes):
    return {name: value for name, value in {**saved, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.1.weight": torch.zeros(5, 5)}, r"model.1.weight was \[5, 5\] of torch.float32 and is \[4, 4\]"),
        ({"model.1.bias": torch.zeros(4).double()}, r"was \[4\] of torch.float64 and is \[4\] of torch.float32"),
        ({"model.2.running_var": None}, "model.2.running_var is not in it"),
        ({"model.9.weight": torch.zeros(1)}, "model.9.weight is not in the model"),
        ({"optim_class": "SGD"}, "the optimizer was SGD and is AdamW"),
        ({"optim_groups": []}, "parameter groups"),
        ({"optim_groups": None}, "optim_groups is missing"),
        ({"optim.9.weight.exp_avg": torch.zeros(1)}, "optim.9.weight.exp_avg is of a parameter that the model"),
        ({"optim.1.bias.exp_avg": torch.zeros(7)}, r"optim.1.bias.exp_avg was \[7\] and is \[4\]"),
        ({"loader": None}, "loader is missing"),
        ({"progress": None}, "progress is missing"),
    ],
)
def test_another_model_or_optimizer_is_refused_and_nothing_changes(change, text):
    state, model, optim, position = make()
    train(model, optim, state, position, 1)
    saved = stored(state.state_dict())
    train(model, optim, state, position, 1)
    before = stored(state.state_dict())
    with pytest.raises(ResumeError, match=text) as error:
        state.load_state_dict(broken(saved, **change))
    assert "--fresh true" in str(error.value)
    assert_same(stored(state.state_dict()), before)


def test_many_differences_are_counted_not_listed():
    saved = stored(make(width=6)[0].state_dict())
    with pytest.raises(ResumeError, match=r"model.0.weight .* and \d+ more differences") as error:
        make()[0].load_state_dict(saved)
    assert len(str(error.value)) < 600


def test_other_data_is_refused_before_anything_changes():
    saved = stored(make()[0].state_dict())
    state, model, optim, position = make(seed=3)
    train(model, optim, state, position, 1)
    before = stored(state.state_dict())
    position.refuses = True
    with pytest.raises(ValueError, match="other data"):
        state.load_state_dict(saved)
    assert_same(stored(state.state_dict()), before)


def test_an_optimizer_of_another_model_is_refused():
    _, model, *_ = make()
    other = nn.Linear(2, 2)
    with pytest.raises(ResumeError, match=r"parameter of shape \[2, 2\] that is not the model's"):
        TrainState(model, torch.optim.SGD(other.parameters()), Position())


def test_flat_and_back():
    value = {"a": [1, (2, 3)], "b": [torch.ones(2), {"c": (torch.zeros(1), None)}], "d.e": 5}
    flat = {}
    flatten("x", value, flat)
    flatten("y.z", [1, 2], flat)
    assert all(isinstance(v, torch.Tensor) or json.dumps(v) for v in flat.values())
    assert sorted(roots(flat)) == ["x", "y.z"]
    back = unflatten("x", flat)
    assert (back["a"], back["d.e"]) == ([1, [2, 3]], 5)
    assert torch.equal(back["b"][0], torch.ones(2))
    assert back["b"][1]["c"][1] is None
    with pytest.raises(ResumeError, match=r"x\.1 is a set"):
        flatten("x", [torch.ones(1), {1}], {})


def test_a_scheduler_and_a_scaler_are_parts_of_a_job():
    def job():
        state, model, optimizer, _ = make()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        state = TrainState(model, optimizer, Position(), parts={"scheduler": scheduler, "scaler": scaler})
        return state, model, optimizer, scheduler, scaler

    def step(model, optimizer, scheduler, scaler):
        loss = model(torch.tensor([1, 2, 3])).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()

    old, new = job(), job()
    for _ in range(3):
        step(*old[1:])
    saved = {
        k: v.clone() if isinstance(v, torch.Tensor) else json.loads(json.dumps(v))
        for k, v in old[0].state_dict().items()
    }
    new[0].load_state_dict(saved)
    for _ in range(3):
        step(*old[1:])
        step(*new[1:])
    assert old[3].get_last_lr() == new[3].get_last_lr()
    assert old[4].get_scale() == new[4].get_scale() != 8.0
    for left, right in zip(old[1].parameters(), new[1].parameters(), strict=True):
        assert torch.equal(left, right)
    del saved["parts.scaler"]
    with pytest.raises(ResumeError, match=r"parts\.scaler is missing"):
        new[0].load_state_dict(saved)


def test_parameters_that_are_not_trained_are_declared_never_to_change():
    from checkpointing import Mutability, TensorProvider

    state, model, _, _ = make()
    model[1].weight.requires_grad_(False)
    given = state.state_providers()
    assert given["model.1.weight"] == TensorProvider(given["model.1.weight"].tensor, Mutability.NEVER)
    assert given["model.1.weight"].tensor.data_ptr() == model[1].weight.data_ptr()
    assert given.keys() == state.state_dict().keys()
    assert sum(isinstance(value, TensorProvider) for value in given.values()) == 1


def test_a_job_whose_data_has_no_position():
    model = nn.Linear(2, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state.step = 3
    saved = state.state_dict()
    other = nn.Linear(2, 1)
    back = TrainState(other, torch.optim.SGD(other.parameters(), lr=0.1))
    back.load_state_dict(saved)
    assert back.step == 3
    assert torch.equal(other.weight, model.weight)
