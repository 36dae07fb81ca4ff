"""`doctor`: what is wrong with an MoE model that trains, as findings. Every rank calls and gets the same.

Most of these errors do not stop a run: experts whose gradients are a constant factor off are hidden by Adam, an expert
twice in the optimizer moves twice as fast, a dead one wastes its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe.errors import MoeConfigError
from moe.experts import slice_inner
from moe.parallel import ParallelExperts, expert_layers
from moe.prints import print_of

_SCALE_TOLERANCE = 0.05
_ROUNDING = 1e-6
"""Weights that add up to one give routers what rounding leaves of their gradient: some 1e-8 of that of the experts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where, and what to do."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


def doctor(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    reference: Iterable[tuple[str, nn.Parameter]] | None = None,
) -> list[Finding]:
    """Return what is wrong with a parallelized model, best asked after a forward and backward; none is good.

    Looks for: experts inside DDP, expert parameters that are not marked or are twice in the optimizer, experts that are
    copies of each other, experts that no rank sent a row to, NaN or infinite rows in weights and gradients, experts
    whose copies on the `dp` axis differ, other weights that differ between ranks, and routers without a gradient. With
    `reference`, also for gradients of another scale than one process has: see `audit_gradients`. For an auxiliary loss
    see `audit_aux_loss`. Every rank calls.
    """
    layers = expert_layers(model)
    if not layers:
        raise MoeConfigError("this model is not expert-parallel; call moe.parallelize(model, mesh, ...) first")
    own = [
        *_inside_ddp(model),
        *_unmarked(layers),
        *_twice_in_optimizer(layers, optimizer),
        *(finding for name, layer in layers.items() for finding in _bad_rows(name, layer)),
    ]
    found = dict.fromkeys(_from_all_ranks(own))
    idle = _gather({finding for name, layer in layers.items() for finding in _idle_router(model, name, layer)})
    found |= dict.fromkeys(sorted(set.intersection(*idle), key=str))  # a rank without tokens has no gradient of its own
    found |= dict.fromkeys(_drifted(model, layers))
    for name, layer in layers.items():
        found |= dict.fromkeys(_copies(name, layer))
        found |= dict.fromkeys(_dead(name, layer))
    if reference is not None:
        found |= dict.fromkeys(audit_gradients(model, reference))
    return list(found)


def audit_gradients(model: nn.Module, reference: Iterable[tuple[str, nn.Parameter]]) -> list[Finding]:
    """Return the experts whose gradients are off by a factor from those of one process on the global batch.

    `model` has finished its backward and its averaging; `reference` are the named parameters of the whole model, with
    gradients of the same batch by one process. The factor found is what an error of groups looks like: the size of an
    axis, or one over it. Every rank calls.
    """
    expected = {name: p.grad for name, p in reference}
    own: list[Finding] = []
    for name, layer in expert_layers(model).items():
        for stack, param in layer.named_parameters():
            want = _own_part(layer, stack, expected.get(f"{name}.{stack}"))
            if param.grad is None or want is None:
                own.append(Finding("gradient scale", f"{name}.{stack}", "there is no gradient to compare"))
                continue
            first = layer.runner.lanes.position * layer.num_experts
            own += _compare(f"{name}.{stack}", param.grad, want, first)
    return list(dict.fromkeys(_from_all_ranks(own)))


def audit_aux_loss(
    loss: Callable[[float], Tensor],
    gates: Iterable[nn.Parameter],
    *,
    coefficient: float,
    alone: Callable[[], Tensor] | None = None,
) -> list[Finding]:
    """Check that an auxiliary loss enters once: the gradient it adds to the gates grows with `coefficient`, not faster.

    `loss(c)` returns the whole loss of one fixed batch with the auxiliary coefficient c. Loss and gradient at
    `coefficient` less those at 0 must be half of those at twice the coefficient less those at 0. With `alone`, which
    returns the auxiliary loss of that batch by itself, they must also be `coefficient` times its gradient: a constant
    factor, the number of ranks or layers say, shows in nothing else.
    """
    params = list(gates)
    grads = [_flat_grads(loss(c * coefficient), params) for c in (0, 1, 2)]
    once, twice = grads[1] - grads[0], grads[2] - grads[0]
    if not bool(once.abs().max() > 0):
        return [Finding("aux loss", "gates", "the auxiliary loss gives the gates no gradient; it is left out")]
    factor = float((twice * once).sum() / (once * once).sum())
    if abs(factor - 2) > 2 * _SCALE_TOLERANCE:
        return [Finding("aux loss", "gates", f"twice the coefficient gives {factor:.2f} times the gradient, not 2")]
    if alone is None:
        return []
    wanted = coefficient * _flat_grads(alone(), params)
    scale = float((once * wanted).sum() / (wanted * wanted).sum())
    if abs(scale - 1) <= _SCALE_TOLERANCE:
        return []
    return [Finding("aux loss", "gates", f"its gradient is {scale:.2f} times the coefficient times that of it alone")]


def _flat_grads(loss: Tensor, params: list[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    pairs = zip(params, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).double() for p, g in pairs])


def _inside_ddp(model: nn.Module) -> list[Finding]:
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        # Every parameter it takes part in is averaged over all its ranks, which have different experts.
        ignored = set(getattr(module, "parameters_to_ignore", ()))
        taken = [n for n, p in module.module.named_parameters() if getattr(p, "is_expert", False) and n not in ignored]
        if taken:
            message = "DDP averages it over ranks that hold other experts; set model._ddp_params_and_buffers_to_ignore"
            found += [Finding("experts inside DDP", f"{name or 'model'}: {n}", message) for n in taken]
    return found


def _unmarked(layers: dict[str, ParallelExperts]) -> list[Finding]:
    message = "it is not marked is_expert, so it is averaged over the wrong ranks; do not replace parameters after"
    return [
        Finding("unmarked expert", f"{name}.{stack}", message + " moe.parallelize")
        for name, layer in layers.items()
        for stack, param in layer.named_parameters()
        if not getattr(param, "is_expert", False)
    ]


def _twice_in_optimizer(layers: dict[str, ParallelExperts], optimizer: torch.optim.Optimizer | None) -> list[Finding]:
    if optimizer is None:
        return []
    found, held = [], [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, layer in layers.items():
        for stack, param in layer.named_parameters():
            count = held.count(id(param))
            if param.requires_grad and count != 1:
                message = f"it is {count} times in the optimizer; make the optimizer after moe.parallelize, each once"
                found.append(Finding("expert in optimizer", f"{name}.{stack}", message))
    return found


def _bad_rows(name: str, layer: ParallelExperts) -> list[Finding]:
    found = []
    first = layer.runner.lanes.position * layer.num_experts
    for stack, param in layer.named_parameters():
        for what, value in (("weight", param.detach()), ("gradient", param.grad)):
            if value is None:
                continue
            bad_E = (~value.isfinite()).flatten(1).any(1)
            for e in bad_E.nonzero().flatten().tolist():
                rows = int((~value[e].isfinite()).any(-1).sum())
                message = f"{rows} rows of its {what} are NaN or infinite"
                found.append(Finding("NaN rows", f"{name}.{stack}, expert {first + e}", message))
    return found


def _idle_router(model: nn.Module, name: str, layer: ParallelExperts) -> list[Finding]:
    """The router beside some experts, where backward gave it no gradient but rounding."""
    gate = getattr(model.get_submodule(name.rpartition(".")[0]), "gate", None)
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return []
    grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
    largest = 0.0 if grad is None else _largest(grad)
    beside = max((_largest(p.grad) for p in layer.parameters() if p.grad is not None), default=0.0)
    if not (0 < beside < inf and largest <= _ROUNDING * beside):
        return []
    message = (
        "its gradient is zero or missing, so it learns nothing, which is so right after upcycling; with one expert a "
        "token, whose weight is always one, it stays so: take two, or an auxiliary loss"
    )
    return [Finding("idle router", f"{name.rpartition('.')[0]}.gate", message)]


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _drifted(model: nn.Module, layers: dict[str, ParallelExperts]) -> list[Finding]:
    """What all ranks hold, and no longer alike; one finding, for an error of the loop moves all of it."""
    spread = {id(p) for layer in layers.values() for p in layer.parameters()}
    whole = {n: p for n, p in model.named_parameters() if id(p) not in spread and not isinstance(p, DTensor)}
    prints: dict[str, set[str]] = {}
    for part in _gather({name: print_of(p) for name, p in whole.items()}):
        for name, value in part.items():
            prints.setdefault(name, set()).add(value)
    differing = [name for name, values in prints.items() if len(values) > 1]
    if not differing:
        return []
    message = (
        f"{len(differing)} of {len(prints)} parameters outside the experts differ between ranks; average gradients "
        "over dp, ep and esp, and clip with moe.sync.clip_grad_norm_, not with torch's function"
    )
    return [Finding("ranks differ", differing[0], message)]


def _copies(name: str, layer: ParallelExperts) -> list[Finding]:
    """Experts of one layer that are equal, and copies of one expert on different ranks that are not."""
    prints: dict[tuple[int, int], list[str]] = {}
    first = layer.runner.lanes.position * layer.num_experts
    member = layer.runner.lanes.member
    own = {(first + e, member): print_of(*(p[e] for p in layer.parameters())) for e in range(layer.num_experts)}
    for part in _gather(own):
        for key, value in part.items():
            prints.setdefault(key, []).append(value)
    found = []
    for (e, _), values in sorted(prints.items()):
        if len(set(values)) > 1:
            message = "its copies on the dp axis differ; average expert gradients over dp"
            found.append(Finding("copies differ", f"{name}, expert {e}", message))
    seen: dict[str, int] = {}
    for (e, s), values in sorted(prints.items()):
        if s == 0 and (twin := seen.setdefault(values[0], e)) != e:
            message = f"it equals expert {twin}, which is so right after upcycling and an error after a step"
            found.append(Finding("duplicated expert", f"{name}, expert {e}", message))
    return found


def _dead(name: str, layer: ParallelExperts) -> list[Finding]:
    own = layer.rows_per_expert_E
    every = [rows for rows in _gather(None if own is None else own.tolist()) if rows is not None]
    if not every:
        return []
    total = torch.tensor(every).sum(0)
    message = "no rank sent it a row in the last forward; look at the router's balance"
    return [Finding("dead expert", f"{name}, expert {e}", message) for e in (total == 0).nonzero().flatten().tolist()]


def _own_part(layer: ParallelExperts, stack: str, whole: Tensor | None) -> Tensor | None:
    if whole is None:
        return None
    lanes = layer.runner.lanes
    own = whole[lanes.position * layer.num_experts : (lanes.position + 1) * layer.num_experts]
    return slice_inner(stack, own, lanes.member, lanes.num_members)


def _compare(where: str, got: Tensor, want: Tensor, first: int) -> list[Finding]:
    """One finding where all experts are off by one factor, else one for each that is off."""
    size_E, along_E = (value.double().flatten(1).sum(1) for value in (want * want, got * want))
    used = size_E > 0
    factors = {first + int(e): float(along_E[e] / size_E[e]) for e in used.nonzero().flatten()}
    off = {e: factor for e, factor in factors.items() if not abs(factor - 1) <= _SCALE_TOLERANCE}
    if not off:
        return []
    message = "times that of one process; divide the sum over dp by the ranks of dp, ep and esp"
    mean = float(along_E.sum() / size_E.sum())
    if len(off) == len(factors) and all(abs(f - mean) <= _SCALE_TOLERANCE * abs(mean) for f in off.values()):
        return [Finding("gradient scale", where, f"it is {mean:.3g} {message}")]
    return [Finding("gradient scale", f"{where}, expert {e}", f"it is {f:.3g} {message}") for e, f in off.items()]


def _from_all_ranks(own: list[Finding]) -> list[Finding]:
    return [finding for part in _gather(own) for finding in part]


def _gather(own: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every
