"""Sliding windows, caps on scores and logits, and sinks: exact in chunks, against transformers' own eager attention."""

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from chunkflow import SINGLE, ChunkRunner, check_exact
from chunkflow.attention.base import Scoring, Span
from chunkflow.attention.flash_cpu import FlashCpu
from chunkflow.attention.masked import Masked
from chunkflow.attention.span import SpanAttention
from chunkflow.attention.tiles import tiles_of
from chunkflow.state import GroupState
from tests.tiny import VOCABULARY, tiny_model

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]


def causal_lm(kind, **changes):
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**{**SIZES, **changes})
    model = tf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # large scores: a cap that does nothing would prove nothing
    return model


MODELS = {
    "mistral": lambda: causal_lm("Mistral", sliding_window=11),
    "mistral, window of a chunk": lambda: causal_lm("Mistral", sliding_window=16),
    "qwen2": lambda: causal_lm("Qwen2", sliding_window=9, use_sliding_window=True, layer_types=KINDS),
    "gemma2": lambda: causal_lm(
        "Gemma2", sliding_window=7, layer_types=KINDS, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: causal_lm("Gemma3Text", sliding_window=20, layer_types=KINDS),
    "gpt_oss": lambda: causal_lm("GptOss", sliding_window=13, layer_types=KINDS, num_local_experts=4),
    "granite": lambda: causal_lm("Granite", logits_scaling=2.0),
    "cohere": lambda: causal_lm("Cohere", logit_scale=0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_against_eager_attention(name):
    report = check_exact(MODELS[name](), num_chunks=(4,))
    assert report.exact, str(report)


def visible(prefix, length, window):
    rows = torch.arange(prefix, prefix + length)[:, None]
    columns = torch.arange(prefix + length)
    return (columns <= rows) & (columns > rows - (window or prefix + length + 1))


@given(
    st.integers(0, 200), st.integers(1, 90), st.one_of(st.none(), st.integers(1, 150)),
    st.one_of(st.none(), st.integers(1, 100)),
)  # fmt: skip
def test_tiles_hold_each_visible_pair_once_and_no_row_is_empty(prefix, length, window, rows):
    seen = torch.zeros(length, prefix + length, dtype=torch.int32)
    for tile in tiles_of(prefix, length, window, rows):
        queries = torch.arange(tile.query_start, tile.query_stop)[:, None]
        columns = torch.arange(tile.key_start, tile.key_stop)
        shown = torch.ones(len(queries), len(columns), dtype=torch.bool)
        if tile.causal:
            shown &= columns <= queries
        if tile.window is not None:
            shown &= columns > queries - tile.window
        assert shown.any(1).all()
        assert tile.key_stop <= prefix or tile.key_start >= prefix
        seen[tile.query_start - prefix : tile.query_stop - prefix, tile.key_start : tile.key_stop] += shown
    assert torch.equal(seen.bool(), visible(prefix, length, window))
    assert seen.max() == 1


def test_work_under_a_window_does_not_grow_with_the_prefix():
    def pairs(prefix):
        tiles = tiles_of(prefix, 4096, 512)
        return sum((t.query_stop - t.query_start) * (t.key_stop - t.key_start) for t in tiles)

    assert pairs(1_000_000) == pairs(4096) <= 4096 * 512 * 3


@pytest.mark.parametrize("backend", [FlashCpu(), Masked()], ids=["flash", "masked"])
@pytest.mark.parametrize(("prefix", "window"), [(0, 5), (50, 5), (50, 30), (200, 70), (3, 100)])
def test_windows_of_a_span_equal_attention_written_out(backend, prefix, window):
    torch.manual_seed(0)
    heads, per_head, n, width = 2, 3, 150, 8
    wide = {"dtype": torch.float64, "requires_grad": True}
    q = torch.randn(heads, per_head, n, width, **wide)
    k, v = (torch.randn(heads, prefix + n, width, **wide) for _ in "kv")
    dout = torch.randn(heads, per_head, n, width, dtype=torch.float64)
    scores = torch.einsum("hgnd,hmd->hgnm", q, k) * 0.4
    scores = scores.masked_fill(~visible(prefix, n, window), -torch.inf)
    expected = torch.einsum("hgnm,hmd->hgnd", scores.softmax(-1), v)
    expected.backward(dout)

    state = GroupState(capacity=prefix, offload=True)
    if prefix:
        state.write(0, 0, k.detach()[:, :prefix], v.detach()[:, :prefix])
    attention = SpanAttention(backend, Span(0, n, prefix, 0), state, 0, Scoring(0.4), window)
    own = (q.detach(), k.detach()[:, prefix:], v.detach()[:, prefix:])
    out, lse = attention.forward(*own)
    dq, dk, dv = attention.backward(dout, *own, out, lse)
    if prefix:
        dk, dv = (torch.cat(pair, 1) for pair in zip(state.gradient(0, 0, prefix), (dk, dv), strict=True))
    for ours, theirs in [(out, expected), (dq, q.grad), (dk, k.grad), (dv, v.grad)]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_window_is_left_as_it_was():
    model = tiny_model("mistral", sliding_window=4096)
    ChunkRunner(model, group=SINGLE)
    assert model.config.sliding_window == 4096
    assert all(getattr(m, "sliding_window", 4096) == 4096 for m in model.modules())
