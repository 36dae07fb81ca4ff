"""The gated product of experts against autograd's own, to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from moe.errors import MoeError
from moe.gated import gated


def plain(x, act):
    gate, up = x.chunk(2, dim=-1)
    return act(gate) * up


@pytest.mark.parametrize("act", [F.silu, nn.SiLU(), F.gelu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_the_same_bits_as_autograd(act, dtype, rows):
    torch.manual_seed(rows)
    x = torch.randn(rows, 96).to(dtype).requires_grad_()
    y, want = gated(x, act), plain(x, act)
    grad = torch.randn(rows, 48).to(dtype)
    found, expected = (torch.autograd.grad(out, x, grad)[0] for out in (y, want))
    torch.testing.assert_close((y, found), (want, expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lay", [(False, True), (True, False), (True, True)])
def test_the_same_bits_where_rows_do_not_lie_one_after_another(dtype, lay):
    """Vectors and the rest of a row round otherwise in SiLU's gradient, so where a column lies in a row matters."""
    torch.manual_seed(0)
    x, grad = torch.randn(33, 202, dtype=torch.float64), torch.randn(33, 101, dtype=torch.float64)
    x, grad = (
        t.to(dtype).t().contiguous().t() if by_columns else t.to(dtype)
        for t, by_columns in zip((x, grad), lay, strict=True)
    )
    x.requires_grad_()
    found, expected = (torch.autograd.grad(f(x, F.silu), x, grad)[0] for f in (gated, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_in_fp64_also_of_expanded_ones():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: gated(x, F.silu), x)
    found, expected = (torch.autograd.grad(f(x, F.silu).sum(), x)[0] for f in (gated, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_second_derivatives_are_refused():
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(MoeError, match="double backward"):
        torch.autograd.grad(gated(x, F.silu).sum(), x, create_graph=True)
