"""PEFT: LoRA and its like train in chunks as they are; hand the PEFT model to `ChunkRunner`."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper

from chunkflow.errors import UnsupportedModelError


def base_of(model: Any) -> Any:
    """Return the transformers model inside a `PeftModel`, its adapters in place.

    Raises UnsupportedModelError for methods that do more than change weights: chunks would train without that.
    """
    for name, config in model.peft_config.items():
        beyond = _beyond_weights(model, config)
        if beyond is not None:
            raise UnsupportedModelError(
                f"PEFT adapter {name!r} is {config.peft_type.value}, which {beyond}; chunks train methods that change "
                "weights, such as LoRA"
            )
    return model.get_base_model()


def trained_head(head: Any) -> Any:
    """Return the trained copy of an output projection that `modules_to_save` names.

    Raises UnsupportedModelError on one with an adapter of its own: the loss takes its weight, and nothing else.
    """
    if isinstance(head, ModulesToSaveWrapper):
        return head.modules_to_save[head.active_adapters[0]] if head.active_adapters else head.original_module
    raise UnsupportedModelError(
        f"the output projection is a {type(head).__name__} of PEFT, and the loss of chunks takes a plain weight; leave "
        "it out of target_modules and trainable_token_indices, or name it in modules_to_save"
    )


def _beyond_weights(model: Any, config: Any) -> str | None:
    """Return what a method does beside the layers of the model; None for nothing."""
    if config.is_prompt_learning:
        return "puts tokens or keys before every sequence"
    if getattr(config, "alora_invocation_tokens", None):
        return "begins at certain tokens of a whole sequence (alora_invocation_tokens)"
    if isinstance(model.base_model, BaseTuner) and type(model.base_model).forward is not BaseTuner.forward:
        return "adds a loss of its own, or mixes adapters by the whole sequence, in a forward of its own"
    return None
