"""PEFT: LoRA and its like train in chunks as they are; hand the PEFT model to `ChunkRunner`."""

from __future__ import annotations

from typing import Any

from chunkflow.errors import UnsupportedModelError


def base_of(model: Any) -> Any:
    """Return the transformers model inside a `PeftModel`, its adapters in place.

    Raises UnsupportedModelError for methods that prepend tokens or keys: their positions are no sample's.
    """
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"PEFT adapter {name!r} is {config.peft_type.value}, which puts tokens or keys before every sequence; "
                "chunks train methods that change weights, such as LoRA"
            )
    return model.get_base_model()
