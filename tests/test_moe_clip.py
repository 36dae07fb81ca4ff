"""Clipping an expert-parallel model: the norm and the gradients of one process; and what torch's own function does."""

import pytest
import torch

import moe
from moe.parallel import expert_layers, parallelize
from moe.sliced import attach_reducer
from moe.state import to_local
from moe.sync import average_gradients, clip_grad_norm_
from tests.moe_case import make_mesh
from tests.moe_models import ids_of, tiny_moe
from tests.spawn import run_ranks

MOST = 0.05


def gradients(info, ep, esp, reduce):
    """Return the model of one rank after a backward, its gradients averaged."""
    mesh = make_mesh(info.world_size, ep, esp)
    model = parallelize(tiny_moe("mixtral"), mesh, ep="ep", esp="esp", dp="dp")
    flush = reduce(model)
    model(ids_of(info.rank), labels=ids_of(info.rank)).loss.backward()
    flush()
    return model


def by_slices(model):
    return attach_reducer(model).flush


def plainly(model):
    return lambda: average_gradients(model)


def clipped(info, ep, esp):
    whole = tiny_moe("mixtral")
    losses = [whole(ids_of(r), labels=ids_of(r)).loss for r in range(info.world_size)]
    (sum(losses) / info.world_size).backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), MOST)
    assert norm > 2 * MOST
    errors = []
    for reduce in (plainly, by_slices):
        model = gradients(info, ep, esp, reduce)
        errors.append(float(abs(clip_grad_norm_(model, MOST) - norm)))
        expected = to_local(model, {name: p.grad for name, p in whole.named_parameters()})
        errors += [float((p.grad - expected[name]).abs().max()) for name, p in model.named_parameters()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        before = [grad.clone() for grad in grads]
        clip_grad_norm_(model, 1e6)
        assert all(map(torch.equal, grads, before))
        next(iter(expert_layers(model).values())).runner.lanes.close()
    return max(errors)


@pytest.mark.parametrize(("ep", "esp"), [(2, 2), (2, 1)])
def test_every_rank_clips_as_one_process_does(ep, esp):
    assert max(run_ranks(clipped, 4, ep, esp, timeout_s=120)) < 1e-10


def drifted(info):
    model = gradients(info, 2, 1, plainly)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return [str(finding) for finding in moe.doctor(model)]


def test_the_doctor_finds_what_clipping_by_one_ranks_experts_does():
    for (finding,) in run_ranks(drifted, 2):
        assert finding.startswith("ranks differ: model.embed_tokens.weight: ")
        assert "moe.sync.clip_grad_norm_, not with torch's function" in finding
