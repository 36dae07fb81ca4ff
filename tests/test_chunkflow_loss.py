"""The tiled loss against plain cross entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from chunkflow.loss import TILE_ROWS, Tile, tiled_cross_entropy


def case(rows, dtype, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    offset = torch.randn(50, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(0, 50, (rows,))
    labels[::7] = -100
    weights = torch.rand(rows, dtype=torch.float32)
    weights[1::7] = 0
    return hidden, weight, offset, labels, weights


def plain(hidden, weight, bias, labels, weights):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (cross_entropy(logits, labels, ignore_index=-100, reduction="none") * weights.to(logits.dtype)).sum()


@pytest.mark.parametrize("rows", [1, 30, TILE_ROWS, 2 * TILE_ROWS + 100])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
def test_loss_and_gradients_equal_plain_cross_entropy(rows, bias, dtype, tolerance):
    ours, theirs = case(rows, dtype, bias), case(rows, dtype, bias)
    a, b = tiled_cross_entropy(*ours), plain(*theirs)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    (a / 3).backward()
    (b / 3).backward()
    for x, y in zip(ours[:3], theirs[:3], strict=True):
        if x is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)


def test_bf16_sums_in_fp32():
    hidden, weight, _, labels, weights = case(2000, torch.bfloat16, bias=False)
    loss = tiled_cross_entropy(hidden, weight, None, labels, weights)
    exact = plain(hidden.double(), weight.double(), None, labels, weights.double())
    assert loss.dtype == torch.float32
    assert abs(loss.double() / exact - 1) < 2e-3
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_autocast_is_of_products_only():
    ours = case(700, torch.float32)
    narrow = [*(x.detach().bfloat16() for x in ours[:3]), *ours[3:]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiled_cross_entropy(*ours)
    assert loss == tiled_cross_entropy(*narrow)
    loss.backward()
    exact = case(700, torch.float32)
    plain(*exact).backward()
    for x, y in zip(ours[:3], exact[:3], strict=True):
        assert x.grad.dtype == torch.float32
        assert (x.grad - y.grad).abs().max() < 2e-2 * y.grad.abs().max()
    wide = case(30, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiled_cross_entropy(*wide) == tiled_cross_entropy(*case(30, torch.float64))


def test_no_supervised_token_gives_zero_loss_and_zero_gradients():
    hidden, weight, bias, labels, _ = case(10, torch.float64)
    loss = tiled_cross_entropy(hidden, weight, bias, labels, torch.zeros(10))
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(hidden.grad) == 0
    assert torch.count_nonzero(weight.grad) == 0


def test_frozen_projection_still_gives_the_hidden_gradient():
    hidden, weight, bias, labels, weights = case(30, torch.float64)
    frozen = tiled_cross_entropy(hidden, weight.detach(), bias.detach(), labels, weights)
    (expected,) = torch.autograd.grad(plain(hidden, weight, bias, labels, weights), hidden)
    frozen.backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_logits_of_a_whole_chunk_are_never_in_memory():
    """The largest tensor made is a tile of logits or a gradient, whatever the number of rows."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in [result] if isinstance(t, torch.Tensor))
            return result

    rows, vocabulary = 8 * TILE_ROWS, 3000
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    with Record():
        tiled_cross_entropy(hidden, weight, None, torch.zeros(rows, dtype=torch.long), torch.ones(rows)).backward()
    assert max(seen) == TILE_ROWS * vocabulary


def test_losses_share_a_tile_of_at_most_so_many_bytes(monkeypatch):
    tile, losses = Tile(), [tiled_cross_entropy(*case(rows, torch.float32)) for rows in (400, 30)]
    vocabulary = case(1, torch.float32)[1].shape[0]
    monkeypatch.setattr("chunkflow.loss.TILE_BYTES", 100 * vocabulary * 4)
    shared = [tiled_cross_entropy(*case(400, torch.float32), tile=tile)]
    memory = tile.memory
    assert memory is not None
    assert memory.shape == (100, vocabulary)
    shared.append(tiled_cross_entropy(*case(30, torch.float32), tile=tile))
    assert tile.memory is memory
    torch.testing.assert_close(shared, losses)
