"""`check_exact`, which users call on their own model: it says so when chunks are exact, and when they are not."""

import pytest
import torch
import transformers as tf

from chunkflow import UnsupportedModelError, check_exact
from chunkflow.state import GroupState
from tests.tiny import tiny_model


def test_an_exact_model_is_called_exact_and_left_alone():
    model = tiny_model("qwen3", dtype=torch.float32).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = check_exact(model)
    assert report.exact
    assert {(c.num_chunks, c.retain) for c in report.comparisons} >= {(1, 1), (2, 2), (3, 2), (7, 1), (7, 7)}
    assert "Qwen3ForCausalLM: exact to 1e-10" in str(report)
    assert model.training
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "opt"])
def test_other_families(family):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "glm4_moe":  # its router casts by `.type`
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config = tf.Glm4MoeConfig(
            **sizes, **experts, num_key_value_heads=2, intermediate_size=48, head_dim=8, first_k_dense_replace=1
        )
    elif family == "mixtral":
        config = tf.MixtralConfig(**sizes, num_key_value_heads=2, intermediate_size=48, sliding_window=None)
    else:
        config = tf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=512)
    report = check_exact(tf.AutoModelForCausalLM.from_config(config), num_chunks=(3,))
    assert report.exact, str(report)


def test_lost_gradients_of_the_prefix_are_seen(monkeypatch):
    """The classic mistake: keys and values are kept without a gradient route; it trains, and it is not the same."""
    monkeypatch.setattr(GroupState, "gradient", lambda *_: None)
    report = check_exact(tiny_model(), num_chunks=(3,))
    assert not report.exact
    assert "NOT exact" in str(report)


def test_backward_in_the_wrong_order_is_seen(monkeypatch):
    """The other one: chunks recomputed in ascending order, on dK and dV that are not complete."""

    def ascending(chunks, retain):
        order = [("f", i) for i in range(len(chunks))]
        return order + [(op, i) for i in range(len(chunks)) for op in "FB"]

    monkeypatch.setattr("chunkflow.runner.operations", ascending)
    monkeypatch.setattr("chunkflow.executor.StepExecutor._release", lambda *_, **__: None)
    assert not check_exact(tiny_model(), num_chunks=(3,)).exact


def test_a_model_that_is_refused_is_refused_here_too():
    with pytest.raises(UnsupportedModelError, match="RoPE type 'dynamic'"):
        check_exact(tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
