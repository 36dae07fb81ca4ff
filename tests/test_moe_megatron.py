"""Megatron-core's MoE layer with our dispatcher against its own.

Megatron-core's MoE layer needs CUDA; here its CUDA calls are replaced, on these ranks only (`patched`).
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe.errors import MoeConfigError
from moe.plan import LayerPlan
from tests.spawn import run_ranks

pytest.importorskip("megatron.core")
WIDTH, EXPERTS = 16, 4
SHARED = {"moe_router_topk": 2, "moe_shared_expert_intermediate_size": 24}
SETTINGS = (
    SHARED,
    {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True},
)


class Fake:
    """A CUDA stream and a CUDA event."""

    def __init__(self, *args, **options): ...
    def wait_stream(self, other): ...
    def wait_event(self, event): ...
    def synchronize(self): ...
    def wait(self, *args): ...
    def record(self, *args): ...

    def record_event(self, *args):
        return self


@contextlib.contextmanager
def patched():
    """Stand-ins for the CUDA calls of Megatron-core's layer: streams, events and the current device."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    with (
        mock.patch.object(torch.cuda, "Stream", Fake),
        mock.patch.object(torch.cuda, "Event", Fake),
        mock.patch.object(torch.cuda, "current_stream", Fake),
        mock.patch.object(torch.cuda, "stream", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu),
    ):
        yield


def config_of(settings, *, num_layers=1):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        **settings,
        moe_ffn_hidden_size=24,
        ffn_hidden_size=24,
        expert_model_parallel_size=dist.get_world_size(),
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        bf16=False,
        perform_initialization=True,
    )


def make(kind, settings, **options):
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    config = config_of(settings)
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    torch.manual_seed(dist.get_rank())
    return kind(config, spec.submodules, layer_number=1, **options).double()


def compare(info):
    from megatron.core import parallel_state

    from moe.convert.megatron import CoScheduledMoELayer

    with patched():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
        errors = [compare_with(info, settings) for settings in SETTINGS]
        whole = compare_models(info)
        with pytest.raises(MoeConfigError, match="moe_shared_expert_overlap computes shared experts inside Megatron's"):
            make(CoScheduledMoELayer, SHARED | {"moe_shared_expert_overlap": True})
        parallel_state.destroy_model_parallel()
    return errors, whole


def compare_models(info):
    """Whole models of two MoE layers, trained for two steps; return the largest difference."""
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moe.convert.megatron import CoScheduledMoELayer, co_scheduled

    with pytest.raises(MoeConfigError, match="the spec has no MoELayer; make it with num_experts"):
        co_scheduled(get_gpt_layer_local_spec())
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = config_of({"moe_router_topk": 2, "masked_softmax_fusion": False, **dropout}, num_layers=2)
    ours_spec = co_scheduled(spec, plan=LayerPlan(3, 2))
    theirs, ours = (GPTModel(config, s, 32, 8, position_embedding_type="learned_absolute") for s in (spec, ours_spec))
    ours.load_state_dict(theirs.double().state_dict())
    layers = [m for m in ours.double().modules() if isinstance(m, CoScheduledMoELayer)]
    assert [layer.token_dispatcher.name for layer in layers] == ["layer 1", "layer 2"]
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(info.rank))
    mask = torch.triu(torch.ones(1, 1, 8, 8, dtype=torch.bool), 1)
    worst = 0.0
    tracker = SimpleNamespace(fork=contextlib.nullcontext)
    with mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", return_value=tracker):
        for _ in range(2):
            for model in (theirs, ours):
                model.zero_grad()
                model(ids[:, :-1], torch.arange(8).expand(2, 8), mask, labels=ids[:, 1:]).mean().backward()
            for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (one, other)]
                worst = max(worst, float((grads[0] - grads[1]).abs().max()))
                for param, grad in zip((one, other), grads, strict=True):
                    param.data -= 0.5 * grad
    for layer in layers:
        layer.token_dispatcher.lanes.close()
    return {"weights of two models": worst}


def compare_with(info, settings):
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe.convert.megatron import CoScheduledMoELayer

    results = []
    for kind, options in ((MoELayer, {}), (CoScheduledMoELayer, {"plan": LayerPlan(3, 2)})):
        layer = make(kind, settings, **options)
        if results:
            layer.load_state_dict(results[0].layer.state_dict())
        x = torch.randn(5, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(info.rank))
        y = layer(x.requires_grad_())[0]
        (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        results.append(SimpleNamespace(layer=layer, y=y.detach(), x=x.grad, grads=grads))
    theirs, ours = results
    errors = {"y": float((ours.y - theirs.y).abs().max()), "x": float((ours.x - theirs.x).abs().max())}
    assert set(ours.grads) == set(theirs.grads)
    for name, grad in theirs.grads.items():
        got = ours.grads[name]
        expected = torch.zeros_like(got) if grad is None else grad
        errors[name] = float((got - expected).abs().max())
    ours.layer.token_dispatcher.lanes.close()
    return errors


def test_our_dispatcher_in_megatrons_layer_gives_its_outputs_and_gradients():
    for every, whole in run_ranks(compare, 2, timeout_s=120, fresh=True):
        assert max(whole.values()) < 1e-12, whole
        for errors in every:
            assert len(errors) > 5
            assert max(errors.values()) < 1e-12, errors
