"""Sliced gradients inside the backward of real MoE layers, against the plain average of `moe.sync`."""

import copy
import itertools

import pytest
import torch

from moe.cost import LayerLoad, Line, Profile
from moe.errors import MoeConfigError
from moe.parallel import expert_layers, parallelize
from moe.plan import LayerPlan
from moe.sliced import attach_reducer, backward_order, plain_plans, ready_amounts, use_plans
from moe.spread import plan_model
from moe.sync import average_gradients
from tests.moe_case import make_mesh
from tests.moe_models import ids_of, tiny_moe
from tests.spawn import run_ranks

PROFILE = Profile(all_to_all=Line(1e-4, 1e-8), all_reduce=Line(1e-3, 1e-7), expert_forward=Line(0, 1e-4),
                  expert_backward=Line(0, 2e-4))  # fmt: skip


def backward(model, rank, reducer=None):
    for shift in range(2):
        ids = (ids_of(rank) + shift) % 61
        loss = model(ids, labels=ids).loss
        if reducer is None or shift == 1:
            loss.backward()
        else:
            with reducer.accumulate():
                loss.backward()


def planned_step(info, ep):
    """Average plainly, in slices after backward, and in slices where a plan says; two micro-batches each."""
    grads = []
    model = parallelize(tiny_moe("mixtral"), make_mesh(info.world_size, ep, 1), ep="ep", esp="esp", dp="dp")
    backward(model, info.rank)
    average_gradients(model)
    grads.append({n: p.grad.clone() for n, p in model.named_parameters()})

    reducer = attach_reducer(model, slice_bytes=512)
    sent = []
    for planned in (False, True):
        if planned:
            ready = ready_amounts(reducer)
            loads = [LayerLoad(exchange_bytes=1e4, expert_rows=50, slice_bytes=512)] * 2
            plans = plan_model(PROFILE, loads, ready, quantum=512)
            # Chunks change the order in which expert gradients are added; the bytes hidden may change nothing at all.
            plans = [LayerPlan(1, 1, gradient_bytes=p.gradient_bytes) for p in plans]
            use_plans(model, dict(zip(backward_order(model), plans, strict=True)))
            sent = [p.gradient_bytes for p in plans]
        model.zero_grad()
        backward(model, info.rank, reducer)
        reducer.flush()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    again = ready_amounts(reducer)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids_of(info.rank)).logits, model(ids_of(info.rank)).logits)
    assert all(hasattr(p, "is_expert") == (".experts." in n) for n, p in twin.named_parameters())
    assert not any(layer.runner.drain for layer in expert_layers(twin).values())
    plain = plain_plans(model)
    assert set(plain) == set(expert_layers(model))
    assert not any(p.gradient_bytes for p in plain.values())
    with pytest.raises(MoeConfigError, match="there are plans for nowhere"):
        use_plans(model, {"nowhere": LayerPlan(1, 1)})
    reducer.close()
    next(iter(expert_layers(model).values())).runner.lanes.close()
    return grads, sent, ready, again


@pytest.mark.parametrize("ep", [2, 1])
def test_sliced_equals_plain_and_the_plan_changes_nothing(ep):
    for (plain, after, inside), sent, ready, again in run_ranks(planned_step, 2, ep):
        assert plain.keys() == after.keys() == inside.keys()
        for name, grad in plain.items():
            torch.testing.assert_close(after[name], grad, rtol=1e-12, atol=1e-12)
            assert torch.equal(inside[name], after[name]), name
        assert ready == again
        assert len(ready) == 3
        assert sum(sent) > 0
        assert all(a <= b for a, b in zip(itertools.accumulate(sent), itertools.accumulate(ready), strict=False))


def refused(info):
    import torch.distributed as dist

    model = parallelize(tiny_moe("mixtral"), make_mesh(2, 2, 1), ep="ep", esp="esp", dp="dp")
    alone = [dist.new_group([0]), dist.new_group([1])][info.rank]
    try:
        attach_reducer(model, group=alone)
    except MoeConfigError as error:
        return str(error)


def test_a_group_that_is_not_all_of_the_data_is_refused():
    assert "the group has 1 ranks, the axes dp, ep, esp have 2" in run_ranks(refused, 2)[0]
