"""LoRA: low-rank adapters beside frozen matrices (arXiv 2106.09685), by peft, in the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from launch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters instead of full fine-tuning."""

    rank: int | None = None
    """Rank of the adapters; null trains the whole model."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get one."""
    first_layer: int = 0
    """Decoder layers before this one get none; nothing of them is trained."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}; it must be at least 1, or null")
        if self.first_layer < 0 or not self.alpha > 0:
            raise ConfigError(
                f"lora.first_layer is {self.first_layer} and lora.alpha {self.alpha}; they must be at least 0, and more"
            )


def with_adapters(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """Return the model with adapters, everything else frozen; as it is when `config.rank` is None.

    The adapters' random halves come from torch's seed. Raises ConfigError when peft is not installed, or when the model
    has none of the targets.
    """
    if config.rank is None:
        return model
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"lora.rank is {config.rank}, and peft cannot be imported: pip install peft ({error})"
        ) from error
    num_layers = model.config.get_text_config().num_hidden_layers
    if config.first_layer >= num_layers:
        raise ConfigError(f"lora.first_layer is {config.first_layer}; the model has {num_layers} decoder layers")
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (peft divides it only)
        target_modules=list(config.targets),
        layers_to_transform=list(range(config.first_layer, num_layers)),
    )
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigError(f"lora.targets {list(config.targets)} are not in the model: {error}") from error
    return model


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters to the matrices they stand beside, and drop them: a plain model. In place."""
    wrapped = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name, module in wrapped:
        adapter: Any = module
        adapter.merge()
        parent, _, last = name.rpartition(".")
        base = adapter.get_base_layer()
        assert isinstance(base, nn.Module)
        setattr(model.get_submodule(parent), last, base)
    return model
