"""Gradients beside those of one process: experts a factor off, an auxiliary loss that enters more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.experts import slice_inner
from moe.findings import Finding
from moe.parallel import ParallelExperts, expert_layers
from moe.together import Together

NamedParameters = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
"""What `named_parameters()` of a model gives, or a dict of it."""
_SCALE_TOLERANCE = 0.05


def audit_gradients(model: nn.Module, reference: NamedParameters) -> list[Finding]:
    """Return the parameters whose gradients are off from those of one process on the global batch, by name and expert.

    `model` has finished its backward and its averaging; `reference` are the named parameters of the whole model, with
    gradients of the same batch by one process. A factor is what an error of groups looks like: the size of an axis, or
    one over it; without one, another batch or other weights. Every rank calls. Raises ExchangeError when a rank is lost
    or late.
    """
    together = Together(model, "audit_gradients")
    expected = {name: p.grad for name, p in dict(reference).items()}
    own, seen = [], set[int]()
    for name, layer in expert_layers(model).items():
        for stack, param in layer.named_parameters():
            seen.add(id(param))
            want = _own_part(layer, stack, expected.get(f"{name}.{stack}"))
            if param.grad is None or want is None:
                own.append(Finding("gradient scale", f"{name}.{stack}", "there is no gradient to compare"))
                continue
            first = layer.runner.lanes.position * layer.num_experts
            own += _compare(f"{name}.{stack}", param.grad, want, first, "dp by the ranks of dp, ep and esp")
    for name, param in model.named_parameters():
        want = expected.get(name)
        if id(param) not in seen and param.grad is not None and want is not None and not isinstance(param, DTensor):
            own += _compare(name, param.grad[None], want[None], 0, "all axes by their ranks")
    return list(dict.fromkeys(finding for part in together.gather(own) for finding in part))


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


def _own_part(layer: ParallelExperts, stack: str, whole: Tensor | None) -> Tensor | None:
    if whole is None:
        return None
    lanes = layer.runner.lanes
    own = whole[lanes.position * layer.num_experts : (lanes.position + 1) * layer.num_experts]
    return slice_inner(stack, own, lanes.member, lanes.num_members)


def _compare(where: str, got: Tensor, want: Tensor, first: int, mean_over: str) -> list[Finding]:
    """One finding where all experts are off by one factor, else one for each that is off."""
    size_E, along_E = (value.double().flatten(1).sum(1) for value in (want * want, got * want))
    used = size_E > 0
    factors = {first + int(e): float(along_E[e] / size_E[e]) for e in used.nonzero().flatten()}
    off = {e: factor for e, factor in factors.items() if not abs(factor - 1) <= _SCALE_TOLERANCE}
    if not off:
        error_E = ((got - want).double() ** 2).flatten(1).sum(1) / size_E.where(used, 1)
        worst = float(error_E.max()) ** 0.5
        message = f"the scale is that of one process, and it is {worst:.0%} off; compare the batch and the weights"
        return [Finding("gradient differs", where, message)] if worst > _SCALE_TOLERANCE else []
    message = f"times that of one process; divide the sum over {mean_over}"
    mean = float(along_E.sum() / size_E.sum())
    if len(off) == len(factors) and all(abs(f - mean) <= _SCALE_TOLERANCE * abs(mean) for f in off.values()):
        return [Finding("gradient scale", where, f"it is {mean:.3g} {message}")]
    return [Finding("gradient scale", f"{where}, expert {e}", f"it is {f:.3g} {message}") for e, f in off.items()]
