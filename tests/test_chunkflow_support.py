"""Models that chunks cannot train exactly are refused at start, by layer and reason."""

import pytest
import torch
import transformers as tf

from chunkflow import ChunkRunner, UnsupportedModelError
from chunkflow.attention.base import ChunkView, Span
from chunkflow.attention.interface import chunk_attention
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def with_another_head():
    model = tiny_model()
    model.lm_head = Halved(32, 97, bias=False).double()
    return model


def with_a_window_by_mask_only():
    """As a model would have it whose code hands its window to the mask alone."""
    kinds = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 4096}
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, **kinds))
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    return model


def with_a_nan():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    return model


REFUSED = {
    "dynamic RoPE": (
        lambda: tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"model\.rotary_emb: RoPE type 'dynamic'",
    ),
    "a window that attention is not told of": (
        with_a_window_by_mask_only,
        r"model\.layers\.0: hidden states of 12 tokens in two chunks differ",
    ),
    "chunked attention": (
        lambda: tiny_model("qwen3", layer_types=["full_attention", "chunked_attention"]),
        r"model\.layers\.1 \(Qwen3DecoderLayer\): layer type 'chunked_attention'",
    ),
    "SSM": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)),
        r"backbone\.layers\.0 \(MambaBlock\)",
    ),
    "hybrid": (
        lambda: tf.JambaForCausalLM(tf.JambaConfig(**SIZES, num_experts=2, use_mamba_kernels=False)),
        r"model\.layers\.0 \(JambaMambaDecoderLayer\)",
    ),
    "own attention": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=97, hidden_size=32, n_head=4, n_layer=2)),
        r"transformer\.h\.0 \(BloomBlock\) did not call our attention",
    ),
    "fails with our attention": (
        lambda: tf.FalconForCausalLM(tf.FalconConfig(**SIZES)),
        r"transformer\.h\.0 failed with our attention",
    ),
    "not causal": (
        lambda: tf.BertGenerationDecoder(tf.BertGenerationConfig(**SIZES)),
        r"bert\.encoder\.layer\.0: hidden states of 12 tokens in two chunks differ",
    ),
    "router loss": (
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, sliding_window=None, num_local_experts=4, output_router_logits=True)
        ),
        r"router's auxiliary loss",
    ),
    "an output projection that does more": (with_another_head, r"logits are not what its output projection gives"),
    "layer dropout": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layerdrop=0.1)
        ),
        r"model\.decoder\.layers\.0: config\.layerdrop = 0\.1: .* set it to 0",
    ),
    "layers that give lists": (
        lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
        r"transformer\.h\.0 \(Block\) did not call our attention",
    ),
    "weights that are not finite": (with_a_nan, r"hidden states that are not finite"),
    "no output projection": (lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES)), r"must be a causal LM"),
    "not transformers": (lambda: torch.nn.Linear(2, 2), r"Linear is not a transformers model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_layer_and_reason(name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        ChunkRunner(make())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_accepted_and_left_as_it_was(family, dtype):
    model = tiny_model(family, dtype=dtype)
    model.train()
    list(model.modules())[3].eval()  # a frozen part in eval mode stays in it
    modes = [m.training for m in model.modules()]
    attention = model.config._attn_implementation
    rng = torch.get_rng_state()
    ChunkRunner(model)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def test_positions_that_are_ignored_are_seen_in_low_precision():
    """Blenderbot counts positions by itself, from 0 in every call."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = tf.BlenderbotSmallConfig(vocab_size=97, d_model=32, **layers)
    model = tf.BlenderbotSmallForCausalLM(config).to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="differ from the whole run"):
        ChunkRunner(model)


def test_a_layer_that_looks_beyond_its_chunk_is_found_by_running():
    """No setting gives this one away: a layer that mixes tokens by itself, besides its attention."""
    model = tiny_model()
    layer = model.model.layers[1]
    original = layer.mlp.forward
    layer.mlp.forward = lambda x: original(x) + x.cumsum(1) * 0.1
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: hidden states .* differ"):
        ChunkRunner(model)


def test_a_fresh_output_projection_of_zeros_is_no_reason_to_refuse():
    model = tiny_model(dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.lm_head.weight)
    ChunkRunner(model)


def test_dtypes_that_differ_without_autocast_are_refused():
    layer = tiny_model().model.layers[1].self_attn
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* convert the whole model"):
        chunk_attention(layer, q, k, k.bfloat16(), None, chunk_view=ChunkView((Span(0, 3, 0, 0),)))


def test_which_models_have_learned_positions():
    sizes = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = tf.OPTForCausalLM(tf.OPTConfig(**sizes, word_embed_proj_dim=32))
    assert ChunkRunner(tiny_model("gpt2")).num_positions == 512
    assert ChunkRunner(opt).num_positions == opt.config.max_position_embeddings == 2048
    assert ChunkRunner(tiny_model()).num_positions is None
