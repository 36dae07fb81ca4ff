"""Which experts of a transformers model can be spread: those that compute `down(act(gate(x)) * up(x))`, and no more."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from moe.errors import MoeConfigError
from moe.experts import INNER

ADAPTED = (
    "its weights are computed from others, as with an adapter over experts (peft's target_parameters), whose gradients "
    "would be averaged over ranks with other experts; adapt other modules, or train the experts themselves"
)
REPLACED = (
    "its weights are not those of moe.parallelize; where FSDP put its own there, which are parts of other experts on "
    "every rank, give it the experts' weights (is_expert) as ignored_params, else set their values, not parameters"
)
_INTERFACE = "transformers.integrations.moe"
"""Where the call of all experts of transformers is, and their common gating."""

_KIND = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


def check_kind(name: str, module: nn.Module) -> None:
    """Raise MoeConfigError where the experts `module` compute something else than what would take their place."""
    kind = type(module).__name__
    if not _has_common_call(module):
        raise MoeConfigError(f"{name}: {kind} is called in a way of its own, not as the experts of other models are")
    for flag, wanted in _KIND.items():
        if getattr(module, flag, wanted) is not wanted:
            raise MoeConfigError(f"{name}: {flag} is {not wanted} for {kind}; these are not supported")
    gating = getattr(type(module), "_apply_gate", None)
    if gating is not None and gating.__module__ != _INTERFACE:
        raise MoeConfigError(f"{name}: {kind} has a gating of its own (_apply_gate); these are not supported")
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise MoeConfigError(
            f"{name}: {kind} is sharded already (DTensor); call moe.parallelize first, then shard the rest"
        )
    _check_weights(name, module)
    if name.rpartition(".")[2] == "base_layer":
        raise MoeConfigError(f"{name}: {ADAPTED}")


def _has_common_call(module: nn.Module) -> bool:
    """Whether nobody wrote another forward for these experts: a subclass, say, or what offloads them."""
    return getattr(module.forward, "__globals__", {}).get("__name__") == _INTERFACE


def _check_weights(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    others = {n for n, _ in (*module.named_parameters(), *module.named_buffers())} - INNER.keys()
    if others or not callable(getattr(module, "act_fn", None)):
        raise MoeConfigError(
            f"{name}: {kind} has {', '.join(sorted(others)) or 'no act_fn'} beside gate_up_proj and down_proj; such "
            "experts, quantized ones say, are not supported"
        )
    dtypes = [module.get_parameter(stack).dtype for stack in INNER]
    if len(set(dtypes)) > 1:
        raise MoeConfigError(f"{name}: gate_up_proj is {dtypes[0]} and down_proj {dtypes[1]}; give both one dtype")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise MoeConfigError(
            f"{name}: there are hooks on {kind}, which is replaced; register them after moe.parallelize, or remove them"
        )
