"""Rows of tokens and sums over them, against the plain formula and autograd's gradients of it."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moe.sums import gather_tokens, places_of, spread_tokens


def made(tokens: int, per_token: int, dtype: torch.dtype, weights: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(tokens + per_token)
    chosen_R = torch.randperm(tokens * per_token)
    rows = torch.randn(tokens * per_token, 64).to(dtype).requires_grad_()
    return chosen_R, rows, torch.rand(tokens, per_token).to(weights).requires_grad_()


def plain(rows: Tensor, weights_TK: Tensor, chosen_R: Tensor) -> Tensor:
    every = torch.zeros(len(rows), rows.shape[1], dtype=torch.promote_types(rows.dtype, weights_TK.dtype))
    every = every.index_copy(0, chosen_R, rows * weights_TK.reshape(-1)[chosen_R].unsqueeze(-1))
    return every.view(*weights_TK.shape, -1).sum(1)


@pytest.mark.parametrize("per_token", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_same_bits_as_the_plain_formula(per_token: int, dtype: torch.dtype, weights: torch.dtype) -> None:
    chosen_R, rows, weights_TK = made(9, per_token, dtype, weights)
    want = plain(rows, weights_TK, chosen_R).to(dtype)
    got = gather_tokens(rows, weights_TK, places_of(chosen_R, per_token), dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    grad = torch.randn(want.shape).to(dtype)
    expected = torch.autograd.grad(want, [rows, weights_TK], grad)
    found = torch.autograd.grad(got, [rows, weights_TK], grad)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1])  # a product and a sum, or a dot product


def test_spread_is_an_index_and_its_gradient_adds_up() -> None:
    chosen_R, _, _ = made(7, 3, torch.float64, torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = spread_tokens(x, places_of(chosen_R, 3))
    want = x[chosen_R // 3]
    torch.testing.assert_close(rows, want, rtol=0, atol=0)
    grad = torch.randn_like(rows)
    torch.testing.assert_close(torch.autograd.grad(rows, x, grad), torch.autograd.grad(want, x, grad))


def test_gradients_in_fp64() -> None:
    chosen_R, rows, weights_TK = made(4, 3, torch.float64, torch.float64)
    places = places_of(chosen_R, 3)
    assert gradcheck(lambda r, w: gather_tokens(r, w, places, torch.float64), (rows, weights_TK))
    assert gradcheck(lambda x: spread_tokens(x, places), torch.randn(4, 5, dtype=torch.float64, requires_grad=True))


def test_weights_that_are_not_trained() -> None:
    chosen_R, rows, weights_TK = made(4, 2, torch.float32, torch.float32)
    total = gather_tokens(rows, weights_TK.detach(), places_of(chosen_R, 2), torch.float32)
    (found,) = torch.autograd.grad(total.sum(), rows)
    torch.testing.assert_close(found, weights_TK.detach().reshape(-1)[chosen_R].unsqueeze(1).expand_as(rows))


def test_no_tokens() -> None:
    chosen_R, rows, weights_TK = made(0, 2, torch.float32, torch.float32)
    total = gather_tokens(rows, weights_TK, places_of(chosen_R, 2), torch.float32)
    assert total.shape == (0, 64)
    total.sum().backward()
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape
    assert spread_tokens(torch.randn(0, 64), places_of(chosen_R, 2)).shape == (0, 64)
