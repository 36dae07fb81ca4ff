"""Other models of transformers with experts: spread exactly, or refused by name and unchanged."""

import functools
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe.errors import MoeConfigError
from moe.kinds import check_kind
from moe.parallel import expert_layers, parallelize
from moe.plan import LayerPlan
from moe.state import load_state_dict, to_local
from moe.sync import average_gradients
from tests.moe_case import backward_of, errors_of, make_layer, make_mesh, reference, tokens_of
from tests.moe_models import VOCABULARY, ids_of, tiny_moe
from tests.spawn import run_ranks

EXACT = 1e-10
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "first_k_dense_replace": 1, "moe_layer_start_index": 0,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPREAD = ("qwen2_moe", "granitemoe", "deepseek_v2", "glm4_moe", "ernie4_5_moe", "minimax_m2")
REFUSED = {
    "gpt_oss": "has_bias is True for GptOssExperts; these are not supported",
    "aria_text": "is_transposed is True for AriaExperts; these are not supported",
    "llama4_text": "Llama4TextExperts is called in a way of its own, not as the experts of other models are",
    "deepseek_v4": "DeepseekV4Experts has a gating of its own (_apply_gate); these are not supported",
}


def made(family):
    kind = CONFIG_MAPPING[family]
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= set(inspect.signature(kind.__init__).parameters)
    config = kind(**{name: size for name, size in SIZES.items() if name in known})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.set_experts_implementation("eager")
    return model


def spread(info, family):
    """Return the largest error of logits and averaged gradients, or what the refusal says."""
    whole, model = made(family), made(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        parallelize(model, make_mesh(2, 2, 1), ep="ep", esp="esp", dp="dp", plan=LayerPlan(2, 3))
    except MoeConfigError as error:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return str(error)
    outs = [whole(ids_of(rank), labels=ids_of(rank)) for rank in range(2)]
    (sum(out.loss for out in outs) / 2).backward()
    out = model(ids_of(info.rank), labels=ids_of(info.rank))
    out.loss.backward()
    average_gradients(model)
    expected = to_local(model, {name: p.grad for name, p in whole.named_parameters()})
    errors = [float((out.logits - outs[info.rank].logits).detach().abs().max())]
    for name, p in model.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        errors += [] if p.grad is None else [float((p.grad - expected[name]).abs().max())]
    next(iter(expert_layers(model).values())).runner.lanes.close()
    return max(errors)


@pytest.mark.parametrize("family", SPREAD)
def test_models_whose_experts_compute_the_same_are_spread_exactly(family):
    assert max(run_ranks(spread, 2, family)) < EXACT


@pytest.mark.parametrize("family", REFUSED)
def test_experts_that_compute_something_else_are_refused_by_name(family):
    for said in run_ranks(spread, 2, family):
        assert said.startswith("model.layers.")
        assert said.endswith(REFUSED[family])


def test_a_layer_compiles_around_its_experts():
    layer, x = make_layer(plan=LayerPlan(2, 3)), tokens_of(0, [6]).requires_grad_()
    y = torch.compile(layer, backend="eager")(x).hidden
    backward_of(y)
    torch._dynamo.reset()
    assert errors_of(layer, x, y, reference([0], [6]), 0) < EXACT


class Doubled(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


def test_experts_that_somebody_changed_are_refused():
    config = tiny_moe("mixtral").config
    check_kind("x", MixtralExperts(config))
    wrapped, mixed, hooked = (MixtralExperts(config) for _ in range(3))
    wrapped.forward = functools.partial(wrapped.forward)  # as accelerate's offloading does
    for other in (Doubled(config), wrapped):
        with pytest.raises(MoeConfigError, match="is called in a way of its own"):
            check_kind("x", other)
    mixed.down_proj.data = mixed.down_proj.data.half()
    with pytest.raises(MoeConfigError, match=r"x: gate_up_proj is .* and down_proj torch.float16; give both one dtype"):
        check_kind("x", mixed)
    hooked.register_forward_hook(print)
    with pytest.raises(MoeConfigError, match="x: there are hooks on MixtralExperts, which is replaced"):
        check_kind("x", hooked)


def loads(info):
    model = parallelize(tiny_moe("mixtral"), make_mesh(2, 1, 2), ep="ep", esp="esp", dp="dp")
    name, state = "model.layers.1.mlp.experts.gate_up_proj", tiny_moe("mixtral", initializer_range=0.1).state_dict()
    before, said = {n: v.clone() for n, v in model.state_dict().items()}, []
    for change in (
        lambda v: v[:, :1],  # too narrow to be sliced over esp
        lambda v: v[..., :-1],
        lambda v: v.to_sparse(),
        lambda v: v.to("meta"),
        lambda v: v.tolist(),
        lambda v: v > 0,
    ):
        with pytest.raises(MoeConfigError) as caught:
            load_state_dict(model, {**state, name: change(state[name])})
        said.append(name in str(caught.value))
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    next(iter(expert_layers(model).values())).runner.lanes.close()
    return said


def test_states_that_cannot_be_loaded_are_refused_before_anything_is_changed():
    assert run_ranks(loads, 2) == [[True] * 6] * 2
