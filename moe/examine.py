"""`doctor`: what is wrong with an MoE model that trains, as findings. Every rank calls and gets the same.

Most of these errors do not stop a run: experts whose gradients are a constant factor off are hidden by Adam, an expert
twice in the optimizer moves twice as fast, a dead one wastes its memory.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe.audit import NamedParameters, audit_gradients
from moe.findings import Finding
from moe.parallel import ParallelExperts, expert_layers
from moe.prints import print_of
from moe.together import Together

_ROUNDING = 1e-6
"""Weights that add up to one give routers what rounding leaves of their gradient: some 1e-8 of that of the experts."""


def doctor(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    reference: NamedParameters | None = None,
) -> list[Finding]:
    """Return what is wrong with a parallelized model, best asked after a forward and backward; none is good.

    Looks for: experts inside DDP, expert parameters that are not marked or are twice in the optimizer, experts that are
    copies of each other, experts that no rank sent a row to, NaN or infinite rows in weights and gradients, experts
    whose copies on the `dp` axis differ, other weights that differ between ranks, and routers without a gradient. With
    `reference`, also for gradients of another scale than one process has: see `audit_gradients`. For an auxiliary loss
    see `audit_aux_loss`. Every rank calls. Raises ExchangeError when a rank is lost or late.
    """
    layers, together = expert_layers(model), Together(model, "doctor")
    own = [
        *_inside_ddp(model),
        *_unmarked(layers),
        *_twice_in_optimizer(layers, optimizer),
        *(finding for name, layer in layers.items() for finding in _bad_rows(name, layer)),
        *_bad_others(model, layers),
    ]
    found = dict.fromkeys(finding for part in together.gather(own) for finding in part)
    idle = together.gather({finding for name, layer in layers.items() for finding in _idle_router(model, name, layer)})
    found |= dict.fromkeys(sorted(set.intersection(*idle), key=str))  # a rank without tokens has no gradient of its own
    found |= dict.fromkeys(_drifted(model, layers, together))
    for name, layer in layers.items():
        found |= dict.fromkeys(_copies(name, layer, together))
        found |= dict.fromkeys(_dead(name, layer, together))
    if reference is not None:
        found |= dict.fromkeys(audit_gradients(model, reference))
    return list(found)


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


def _bad_others(model: nn.Module, layers: dict[str, ParallelExperts]) -> list[Finding]:
    """Of routers and all else that is not an expert."""
    experts = {id(p) for layer in layers.values() for p in layer.parameters()}
    return [
        Finding("NaN rows", name, f"its {what} has values that are NaN or infinite")
        for name, param in model.named_parameters()
        if id(param) not in experts
        for what, value in (("weight", param.detach()), ("gradient", param.grad))
        if value is not None and not bool(_local(value).isfinite().all())
    ]


def _idle_router(model: nn.Module, name: str, layer: ParallelExperts) -> list[Finding]:
    """The router beside some experts, where backward gave it no gradient but rounding."""
    gate = getattr(model.get_submodule(name.rpartition(".")[0]), "gate", None)
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return []
    largest = 0.0 if weight.grad is None else _largest(_local(weight.grad))
    beside = max((_largest(p.grad) for p in layer.parameters() if p.grad is not None), default=0.0)
    if not (0 < beside < inf and largest <= _ROUNDING * beside):
        return []
    message = (
        "its gradient is zero or missing, so it learns nothing, which is so right after upcycling; with one expert a "
        "token, whose weight is always one, it stays so: take two, or an auxiliary loss"
    )
    return [Finding("idle router", f"{name.rpartition('.')[0]}.gate", message)]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _drifted(model: nn.Module, layers: dict[str, ParallelExperts], together: Together) -> list[Finding]:
    """What all ranks hold, and no longer alike; one finding, for an error of the loop moves all of it."""
    spread = {id(p) for layer in layers.values() for p in layer.parameters()}
    whole = {n: p for n, p in model.named_parameters() if id(p) not in spread and not isinstance(p, DTensor)}
    prints: dict[str, set[str]] = {}
    for part in together.gather({name: print_of(p) for name, p in whole.items()}):
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


def _copies(name: str, layer: ParallelExperts, together: Together) -> list[Finding]:
    """Experts of one layer that are equal, whole or in part, and copies of one expert on other ranks that are not."""
    prints: dict[tuple[int, int], list[tuple[str, ...]]] = {}
    first = layer.runner.lanes.position * layer.num_experts
    member = layer.runner.lanes.member
    own = {(first + e, member): tuple(print_of(p[e]) for p in layer.parameters()) for e in range(layer.num_experts)}
    for part in together.gather(own):
        for key, value in part.items():
            prints.setdefault(key, []).append(value)
    found = []
    for (e, _), values in sorted(prints.items()):
        if len(set(values)) > 1:
            message = "its copies on the dp axis differ; average expert gradients over dp"
            found.append(Finding("copies differ", f"{name}, expert {e}", message))
    return found + _twins(name, [stack for stack, _ in layer.named_parameters()], prints)


def _twins(name: str, stacks: list[str], prints: dict[tuple[int, int], list[tuple[str, ...]]]) -> list[Finding]:
    seen: dict[tuple[str, str], int] = {}
    found = []
    for (e, member), values in sorted(prints.items()):
        if member:
            continue
        pairs = list(zip(stacks, values[0], strict=True))
        twins = {stack: twin for stack, value in pairs if (twin := seen.setdefault((stack, value), e)) != e}
        whole = len(twins) == len(stacks) and len(set(twins.values())) == 1
        for stack, twin in list(twins.items())[: 1 if whole else None]:
            what = f"it equals expert {twin}" if whole else f"its {stack} equals that of expert {twin}"
            message = f"{what}, which is so right after upcycling and an error after a step"
            found.append(Finding("duplicated expert", f"{name}, expert {e}", message))
    return found


def _dead(name: str, layer: ParallelExperts, together: Together) -> list[Finding]:
    own = layer.rows_per_expert_E
    every = [rows for rows in together.gather(None if own is None else own.tolist()) if rows is not None]
    if not every:
        return []
    total = torch.tensor(every).sum(0)
    message = "no rank sent it a row in the last forward; look at the router's balance"
    return [Finding("dead expert", f"{name}, expert {e}", message) for e in (total == 0).nonzero().flatten().tolist()]
