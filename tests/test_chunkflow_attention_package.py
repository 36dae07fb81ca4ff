"""The `flash_attn` package behind the seam: what is handed over and taken back. Its kernels need a GPU.

`Operators` has the signatures of flash_attn 2.7 and newer, in plain torch, so that an argument of another name or in
another place fails here. What is said of shapes and windows is what the package documents.
"""

import pytest
import torch

from chunkflow.attention import function
from chunkflow.attention.base import Scoring, Span
from chunkflow.attention.flash_cuda import FlashCuda
from chunkflow.attention.flash_package import FlashPackage, kernels
from chunkflow.attention.function import choose_backend
from chunkflow.attention.masked import Masked
from chunkflow.attention.span import SpanAttention
from chunkflow.state import GroupState


class Operators:
    """The package's two operators over packed rows: q [total_q, H, D], k and v [total_k, Hk, D], lse [H, total_q]."""

    @staticmethod
    def _wrapped_flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scores, _ = scores_of(q, k, softmax_scale, causal, window_size_left, window_size_right, softcap)
        lse = scores.logsumexp(-1)
        out = torch.einsum("hnm,mhd->nhd", (scores - lse.unsqueeze(-1)).exp(), repeated(v, q))
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _wrapped_flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert softmax_lse.is_contiguous()
        assert all(x.stride(-1) == 1 for x in (dout, q, k, v, out, dq, dk, dv))
        check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scores, slope = scores_of(q, k, softmax_scale, causal, window_size_left, window_size_right, softcap)
        p = (scores - softmax_lse.unsqueeze(-1)).exp()
        dp = torch.einsum("nhd,mhd->hnm", dout, repeated(v, q))
        ds = p * (dp - (dout * out).sum(-1).T.unsqueeze(-1)) * slope * softmax_scale
        dq.copy_(torch.einsum("hnm,mhd->nhd", ds, repeated(k, q)))
        for grad, each in ((dk, torch.einsum("hnm,nhd->mhd", ds, q)), (dv, torch.einsum("hnm,nhd->mhd", p, dout))):
            grad.copy_(each.unflatten(1, (k.shape[1], -1)).sum(2))
        return torch.empty(0)


def repeated(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    for x, ends, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert (ends.dtype, ends.tolist(), longest) == (torch.int32, [0, len(x)], len(x))


def scores_of(q, k, scale, causal, left, right, softcap):
    """A window is counted from the bottom right corner; -1 is none, and `causal` makes the right one 0."""
    capped = torch.tanh(torch.einsum("nhd,mhd->hnm", q, repeated(k, q)) * scale / softcap)
    at = torch.arange(len(q)).unsqueeze(-1) + len(k) - len(q)
    columns, right = torch.arange(len(k)), 0 if causal else right
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    hidden |= (columns > at + right) if right >= 0 else False
    hidden |= (columns < at - left) if left >= 0 else False
    return (capped * softcap).masked_fill(hidden, -torch.inf), 1 - capped.square()


def attended(backend, dtype, device, window, width=16):
    """Return out, lse and every gradient of a span behind a prefix of several blocks, its last one ragged."""
    torch.manual_seed(0)
    heads, per_head, n, prefix = 2, 3, 90, 70
    kind = {"dtype": dtype, "device": device}
    q, dout = (torch.randn(heads, per_head, n, width, **kind) for _ in "qd")
    k, v = (torch.randn(heads, prefix + n, width, **kind) for _ in "kv")
    state = GroupState(capacity=prefix)
    state.write(0, 0, k[:, :prefix], v[:, :prefix])
    attention = SpanAttention(backend, Span(0, n, prefix, 0), state, 0, Scoring(0.3, softcap=1.5), window)
    own = (q, k[:, prefix:], v[:, prefix:])
    out, lse = attention.forward(*own)
    grads = attention.backward(dout, *own, out.to(dtype), lse)
    return [out, lse, *grads, *state.gradient(0, 0, prefix)]


@pytest.mark.parametrize("window", [None, 7, 75])
def test_the_call_means_what_masked_products_mean(window, monkeypatch):
    monkeypatch.setattr("chunkflow.attention.tiles.PREFIX_BLOCK", 32)
    ours = attended(FlashPackage(Operators), torch.float64, "cpu", window)
    for found, plain in zip(ours, attended(Masked(), torch.float64, "cpu", window), strict=True):
        assert (found - plain).abs().max() <= 1e-12 * max(1.0, plain.abs().max())


def test_it_serves_capped_scores_on_cuda_where_it_is_installed(monkeypatch):
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for installed, capped, kind in [
        (Operators, True, FlashPackage),
        (Operators, False, FlashCuda),
        (None, True, Masked),
    ]:
        monkeypatch.setattr(function, "kernels", lambda found=installed: found)
        assert isinstance(choose_backend(cuda, bf16, 64, plain=True, capped=capped), kind)
    monkeypatch.setattr(function, "kernels", lambda: Operators)
    assert isinstance(choose_backend(cuda, torch.float32, 64, plain=True, capped=True), Masked)
    assert isinstance(choose_backend(cuda, bf16, 64, plain=False, capped=True), Masked)
    assert isinstance(choose_backend(torch.device("cpu"), bf16, 64, plain=True, capped=True), Masked)


def test_another_package_of_that_name_is_none(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()  # as FA4 comes: a namespace without the module
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "flash_attn", raising=False)
    assert kernels() is None
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("def _flash_attn_varlen_forward(): ...\n")
    assert kernels() is None  # 2.6 and older


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 7, 75])
def test_its_kernels_equal_masked_products(window):
    found = kernels()
    if found is None:
        pytest.skip("flash_attn is not installed")
    ours, plain = (attended(b, torch.bfloat16, "cuda", window, width=64) for b in (FlashPackage(found), Masked()))
    for a, b in zip(ours, plain, strict=True):
        assert (a.double() - b.double()).abs().max() <= 3e-2 * max(1.0, b.double().abs().max())
