import pytest
import torch
from torch import nn

from launch.gradnorm import clip_, global_grad_norm


def model_with_gradients(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False))
    model[2].weight = model[0].weight
    model(torch.tensor([1, 2, 3])).square().sum().backward()
    return model


def test_tied_weights_count_once_and_torch_agrees():
    model = model_with_gradients()
    every = [param for _, param in model.named_parameters(remove_duplicate=False)]
    assert len(every) == 4
    flat = torch.cat([param.grad.flatten() for param in model.parameters()]).double()
    assert float(global_grad_norm(every)) == pytest.approx(float(flat.norm()), rel=1e-6)


def test_clipping_scales_to_the_limit_once():
    model = model_with_gradients()
    every = [param for _, param in model.named_parameters(remove_duplicate=False)]
    before = [param.grad.clone() for param in model.parameters()]
    norm = global_grad_norm(every)
    clip_(every, norm, float(norm) / 4)
    assert float(global_grad_norm(every)) == pytest.approx(float(norm) / 4, rel=1e-5)
    for param, grad in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(param.grad, grad / 4, rtol=1e-5, atol=0)


def test_a_short_gradient_stays_as_it_is():
    model = model_with_gradients()
    before = [param.grad.clone() for param in model.parameters()]
    norm = global_grad_norm(model.parameters())
    clip_(model.parameters(), norm, float(norm) * 2)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_no_gradients_and_bad_ones():
    model = model_with_gradients()
    model[1].weight.grad = None
    assert float(global_grad_norm(model.parameters())) > 0
    model[1].bias.grad[0] = float("nan")
    assert torch.isnan(global_grad_norm(model.parameters()))
    model.zero_grad()
    assert float(global_grad_norm(model.parameters())) == 0


def test_half_precision_gradients_are_summed_in_fp32():
    param = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.5)
    assert float(global_grad_norm([param])) == pytest.approx(0.5 * 100_000**0.5, rel=1e-5)
