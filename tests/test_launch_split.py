"""A model against the row of its layers: loss and gradients to the bit."""

import copy

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from launch.errors import ModelError
from launch.layer_costs import app
from launch.split import DecoderArguments, call_decoder, split
from pipeline.costs import Costs
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-dropout": (LlamaForCausalLM, LlamaConfig, {"attention_dropout": 0.2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3-sliding": (
        Qwen3ForCausalLM, Qwen3Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS),
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, EXPERTS),
}  # fmt: skip


def make(name, **changes):
    kind, config_kind, settings = MODELS[name]
    torch.manual_seed(0)
    return kind(config_kind(**{**SIZES, **settings, **changes})).train()


def loss_by_layers(model, ids, positions, labels):
    layers = split(model)
    hidden = layers[0].module(ids)
    arguments = iter(DecoderArguments(model).of(hidden, positions))
    for layer in layers[1:]:
        decodes = layer.kind == "decoder"
        hidden = call_decoder(layer.module, hidden, next(arguments)) if decodes else layer.module(hidden)
    return model.loss_function(logits=hidden, labels=None, shift_labels=labels, vocab_size=model.config.vocab_size)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name):
    whole, pieces = make(name), make(name)
    ids = torch.randint(0, 97, (1, 19), generator=torch.Generator().manual_seed(1))
    positions, labels = torch.arange(19)[None], ids.roll(-1, 1)
    torch.manual_seed(5)
    expected = whole(input_ids=ids, position_ids=positions, labels=labels, shift_labels=labels, use_cache=False).loss
    torch.manual_seed(5)
    loss = loss_by_layers(pieces, ids, positions, labels)
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    for (parameter, p), q in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), parameter


@pytest.mark.parametrize("name", MODELS)
def test_layers_carry_every_parameter_under_its_original_name(name):
    model = make(name)
    layers = split(model)
    assert [layer.kind for layer in layers] == ["embedding", *["decoder"] * 4, "norm", "head"]
    assert [layer.name for layer in layers[:2]] == ["model.embed_tokens", "model.layers.0"]
    names = [n for layer in layers for n in layer.param_names]
    tied = ["model.embed_tokens.weight"] if name in ("llama-tied", "gemma") else []
    assert sorted(names) == sorted([*(n for n, _ in model.named_parameters()), *tied])


def test_the_model_is_left_as_it_was():
    model = make("qwen3")
    before = {name: id(module) for name, module in model.named_modules()}
    split(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert copy.deepcopy(model)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 97)


def test_the_skeleton_holds_no_weights():
    assert not list(DecoderArguments(make("llama")).skeleton.parameters())


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_the_routers_auxiliary_loss_is_refused(name):
    with pytest.raises(ModelError, match="output_router_logits adds the routers' auxiliary loss"):
        split(make(name, output_router_logits=True))


def test_models_that_are_more_than_their_layers_are_refused():
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**SIZES, embedding_multiplier=2.0))
    with pytest.raises(ModelError, match="changes the hidden states before its decoder layer 0"):
        split(granite)
    cohere = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5))
    with pytest.raises(ModelError, match="its layers one after another do not give its logits"):
        split(cohere)
    with pytest.raises(ModelError, match=r"has \['wpe', 'ln_f'\] beside its embedding"):
        split(tiny_model("gpt2"))
    gptj = GPTJForCausalLM(GPTJConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))
    with pytest.raises(ModelError, match="GPTJForCausalLM: its layers cannot be called one after another"):
        split(gptj)  # its layers give tuples
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        split(torch.nn.Linear(2, 2))


def test_measured_costs_are_of_every_layer_and_read_back(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model:\n  hidden_size: 32\n  intermediate_size: 64\n  vocab_size: 3000\n")
    output = tmp_path / "costs.json"
    result = CliRunner().invoke(
        app, ["--config", str(recipe), "--tokens", "40", "--repeats", "1", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    costs = Costs.from_json(output.read_text())
    assert costs.num_layers == 5
    assert costs.boundary_bytes == (40 * 32 * 4,)
    assert costs.weight_bytes[0] == costs.weight_bytes[-1] == 3000 * 32 * 4
    assert all(second > 0 for second in (*costs.forward_s[0], *costs.backward_s[0]))
    assert costs.activation_bytes[0][1] == costs.activation_bytes[0][2] > 40 * 32 * 4 * 5
    assert CliRunner().invoke(app, ["--config", str(tmp_path / "none.yaml")]).exit_code == 2
