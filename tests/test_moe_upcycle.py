"""Dense models become MoE models whose outputs are the same at first, and which then train."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from moe.convert.upcycle import upcycle
from moe.errors import MoeConfigError
from tests.tiny import VOCABULARY, tiny_model

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "made"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_outputs_right_after_upcycling_are_those_of_the_dense_model(family, made, tied, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    dense = tiny_model(family, tie_word_embeddings=tied, rope_parameters=rope)
    moe = upcycle(dense, 4, top_k=3)
    assert moe.config.model_type == made
    moe.set_experts_implementation("eager")  # grouped_mm has no fp64
    assert torch.allclose(moe(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-6)
    loss = moe(IDS, labels=IDS)
    loss.loss.backward()
    layer = moe.model.layers[0].mlp
    assert loss.aux_loss > 0
    assert layer.gate.weight.grad.abs().sum() > 0
    assert all(grad.abs().sum() > 0 for grad in layer.experts.down_proj.grad)
    assert not torch.equal(layer.experts.down_proj.grad[0], layer.experts.down_proj.grad[1])
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert torch.equal(loaded(IDS).logits, moe(IDS).logits)


def test_routers_are_the_same_on_every_rank_and_in_every_dtype():
    a, b = (upcycle(tiny_model(), 4, seed=3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert upcycle(tiny_model(dtype=torch.bfloat16), 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "num_experts", "top_k", "text"),
    [
        (lambda: tiny_model(), 2, 3, "top_k is 3 of 2 experts; it must be between 1 and 2"),
        (lambda: tiny_model(mlp_bias=True), 4, 2, "the dense model has mlp_bias=True"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)), 4, 2, "GPT2LMHeadModel cannot be upcyc"),
    ],
)
def test_models_and_sizes_that_cannot_be_are_refused(model, num_experts, top_k, text):
    with pytest.raises(MoeConfigError, match=text):
        upcycle(model(), num_experts, top_k=top_k)
