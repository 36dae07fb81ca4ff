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


def make(kind, settings, **options):
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
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
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    torch.manual_seed(dist.get_rank())
    return kind(config, spec.submodules, layer_number=1, **options).double()


def compare(info):
    from megatron.core import parallel_state

    from moe.convert.megatron import CoScheduledMoELayer

    with patched():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
        errors = [compare_with(info, settings) for settings in SETTINGS]
        with pytest.raises(MoeConfigError, match="moe_shared_expert_overlap computes shared experts inside Megatron's"):
            make(CoScheduledMoELayer, SHARED | {"moe_shared_expert_overlap": True})
        parallel_state.destroy_model_parallel()
    return errors


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
    for every in run_ranks(compare, 2, timeout_s=120, fresh=True):
        for errors in every:
            assert len(errors) > 5
            assert max(errors.values()) < 1e-12, errors
