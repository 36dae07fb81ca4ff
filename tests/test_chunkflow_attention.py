"""Tiles, merged, against softmax attention written out; dropout masks that belong to positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow.attention.base import Scoring, Span, hidden_pairs, merge
from chunkflow.attention.dropout import BLOCK, AttentionDropout
from chunkflow.attention.flash_cpu import FlashCpu
from chunkflow.attention.flash_cuda import FlashCuda, window_left
from chunkflow.attention.function import choose_backend
from chunkflow.attention.masked import Masked
from chunkflow.attention.span import SpanAttention
from chunkflow.attention.tiles import PREFIX_BLOCK, Tile, prefix_blocks, tiles_of
from chunkflow.errors import UnsupportedModelError
from chunkflow.state import GroupState

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def written_out(q, k, v, scale, prefix):
    """q [Hk, G, n, D] against k, v [Hk, prefix + n, D], causal from `prefix` on."""
    scores = torch.einsum("hgnd,hmd->hgnm", q, k) * scale
    hidden = torch.arange(k.shape[1]) > torch.arange(q.shape[2])[:, None] + prefix
    return torch.einsum("hgnm,hmd->hgnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", [FlashCpu(), Masked()], ids=["flash", "masked"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("prefix", [0, 5, 64])
def test_span_attention_equals_attention_written_out(backend, dtype, prefix, monkeypatch):
    monkeypatch.setattr("chunkflow.attention.tiles.PREFIX_BLOCK", 16)  # several blocks, the last one ragged
    monkeypatch.setattr(FlashCpu, "causal_rows", 8)
    torch.manual_seed(0)
    heads, per_head, n, width, scale = 2, 3, 21, 8, 0.4
    wide = {"dtype": torch.float64, "requires_grad": True}
    q = torch.randn(heads, per_head, n, width, **wide)
    k, v = (torch.randn(heads, prefix + n, width, **wide) for _ in "kv")
    dout = torch.randn(heads, per_head, n, width, dtype=torch.float64)
    expected = written_out(q, k, v, scale, prefix)
    expected.backward(dout)

    state = GroupState(capacity=prefix)
    k_, v_ = k.detach().to(dtype), v.detach().to(dtype)
    if prefix:
        state.write(0, 0, k_[:, :prefix], v_[:, :prefix])
    attention = SpanAttention(backend, Span(0, n, prefix, 0), state, 0, Scoring(scale))
    own = (q.detach().to(dtype), k_[:, prefix:], v_[:, prefix:])
    out, lse = attention.forward(*own)
    dq, dk, dv = attention.backward(dout.to(dtype), *own, out.to(dtype), lse)
    if prefix:
        before_k, before_v = state.gradient(0, 0, prefix)  # what this span sent to its prefix
        dk, dv = torch.cat([before_k, dk], 1), torch.cat([before_v, dv], 1)
    for ours, theirs in [(out, expected), (dq, q.grad), (dk, k.grad), (dv, v.grad)]:
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * max(1.0, theirs.abs().max())


def test_gradients_to_the_prefix_are_added_in_fp32():
    state = GroupState(capacity=4)
    ones = torch.ones(1, 4, 2, dtype=torch.bfloat16)
    state.write(0, 0, ones, ones)
    for _ in range(1000):  # bf16 would stop at 256
        state.add_gradient(0, 0, ones, ones)
    dk, _ = state.gradient(0, 0, 4)
    assert dk.dtype == torch.float32
    assert dk.unique().tolist() == [1000.0]


def test_the_last_chunk_is_nobodys_prefix():
    state = GroupState(capacity=4)
    k = torch.randn(1, 4, 2)
    state.write(0, 0, k, k)
    state.write(0, 4, k, k)  # beyond the capacity: not kept
    assert state.layers[0].k.shape == state.layers[0].v.shape == (1, 4, 2)
    assert state.gradient(0, 4, 4) is None


@pytest.mark.parametrize("ran_for", [[], [0], [4]], ids=str)
def test_a_layer_that_did_not_run_for_an_earlier_chunk_is_an_error(ran_for):
    """Raw memory in place of its keys would train, and give nonsense."""
    state = GroupState(capacity=8)
    for start in ran_for:
        state.write(1, start, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 ran for [04] of the 8 tokens"):
        state.read(1, 0, 8)


def test_merge_is_one_softmax_over_both_parts():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    how = Scoring(1.0)
    parts = [
        Masked().forward(q, k[:, low:high], v[:, low:high], tile=Tile(100, 103, low, high), how=how)
        for low, high in ((0, 4), (4, 9))
    ]
    whole, whole_lse = Masked().forward(q, k, v, tile=Tile(100, 103, 0, 9), how=how)
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_prefix_blocks_cover_the_prefix_at_absolute_borders():
    blocks = list(prefix_blocks(2 * PREFIX_BLOCK + 7))
    assert blocks == [(0, PREFIX_BLOCK), (PREFIX_BLOCK, 2 * PREFIX_BLOCK), (2 * PREFIX_BLOCK, 2 * PREFIX_BLOCK + 7)]
    assert list(prefix_blocks(0)) == []


def test_dropout_mask_of_a_pair_does_not_depend_on_the_tile():
    dropout = AttentionDropout(0.3, seed=1, sample=2, layer=3)
    like = torch.empty(0, dtype=torch.float64)
    size = BLOCK + 40
    whole = dropout.keep(2, 0, size, 0, size, like)
    part = dropout.keep(2, BLOCK - 10, 30, 17, 90, like)
    assert torch.equal(part, whole[:, BLOCK - 10 : BLOCK + 20, 17:107])
    assert whole.unique().tolist() == [0.0, 1 / 0.7]
    assert abs((whole == 0).double().mean() - 0.3) < 0.01
    other = AttentionDropout(0.3, seed=1, sample=2, layer=4).keep(2, 0, size, 0, size, like)
    assert not torch.equal(whole, other)


class Calls(TorchDispatchMode):
    """Every operator that is called, with its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func] = args
        return func(*args, **(kwargs or {}))


TILES = [Tile(64, 96, 64, 96, causal=True), Tile(64, 96, 0, 64), Tile(64, 80, 10, 40, window=48)]


@pytest.mark.parametrize("tile", TILES, ids=["own", "prefix", "window"])
def test_the_kernels_for_cuda_are_called_for_dense_rows_and_give_every_shape(tile):
    """On tensors without memory. An empty tensor of cumulative lengths would be taken for packed rows, and fail."""
    n, m = tile.query_stop - tile.query_start, tile.key_stop - tile.key_start
    q = torch.empty(2, 3, n, 16, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(2, m, 16, dtype=torch.bfloat16, device="meta") for _ in "kv")
    with Calls() as calls:
        out, lse = FlashCuda().forward(q, k, v, tile=tile, how=Scoring(0.25))
        grads = FlashCuda().backward(out, q, k, v, out, lse, tile=tile, how=Scoring(0.25))
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    forward = calls.seen[torch.ops.aten._flash_attention_forward.default]
    backward = calls.seen[torch.ops.aten._flash_attention_backward.default]
    assert [t.shape for t in forward[:3]] == [(1, n, 6, 16), (1, m, 2, 16), (1, m, 2, 16)]
    assert forward[3:9] == (None, None, n, m, 0.0, tile.causal)
    assert [t.shape for t in backward[:6]] == [(1, n, 6, 16)] * 2 + [(1, m, 2, 16)] * 2 + [(1, n, 6, 16), (1, 6, n)]
    assert backward[6:12] == (None, None, n, m, 0.0, tile.causal)


@given(st.integers(0, 200), st.integers(1, 150), st.integers(1, 100))
def test_windows_as_the_kernels_for_cuda_count_them(prefix, length, window):
    """From the bottom right corner of a tile, as flash attention documents it."""
    for tile in tiles_of(prefix, length, window):
        n, m = tile.query_stop - tile.query_start, tile.key_stop - tile.key_start
        rows, columns = torch.arange(n)[:, None] + m - n, torch.arange(m)
        seen = columns <= rows if tile.causal else torch.ones(n, m, dtype=torch.bool)
        left = window_left(tile)
        if left is not None:
            assert left >= 0  # below, the kernels would take it for no window
            seen = seen & (columns >= rows - left)
        hidden = hidden_pairs(tile, torch.device("cpu"))
        assert torch.equal(seen, torch.ones_like(seen) if hidden is None else ~hidden)


def test_heads_that_the_kernel_for_cuda_does_not_take(monkeypatch):
    device, dtype = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert isinstance(choose_backend(device, dtype, 64, plain=True), FlashCuda)
    for width in (12, 100, 288):
        assert isinstance(choose_backend(device, dtype, width, plain=True), Masked)
    assert isinstance(choose_backend(device, torch.float32, 64, plain=True), Masked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert isinstance(choose_backend(device, dtype, 64, plain=True), Masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 7, 70])
def test_the_kernels_for_cuda_equal_plain_products(window):
    torch.manual_seed(0)
    heads, per_head, n, prefix, width = 2, 3, 150, 100, 32
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    q, dout = (torch.randn(heads, per_head, n, width, **kind) for _ in "qd")
    k, v = (torch.randn(heads, prefix + n, width, **kind) for _ in "kv")
    found = []
    for backend in (FlashCuda(), Masked()):
        state = GroupState(capacity=prefix)
        state.write(0, 0, k[:, :prefix], v[:, :prefix])
        attention = SpanAttention(backend, Span(0, n, prefix, 0), state, 0, Scoring(0.2), window)
        own = (q, k[:, prefix:], v[:, prefix:])
        out, lse = attention.forward(*own)
        grads = attention.backward(dout, *own, out.to(torch.bfloat16), lse)
        found.append([out, lse, *grads, *state.gradient(0, 0, prefix)])
    for ours, plain in zip(*found, strict=True):
        assert (ours.double() - plain.double()).abs().max() <= 3e-2 * max(1.0, plain.double().abs().max())
