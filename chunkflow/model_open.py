"""A causal LM for a command: a pretrained one by folder or name, or one with random weights by its configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chunkflow.errors import ChunkflowError
from chunkflow.hub import is_name, offline, unreachable


def open_model(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model; `name` is a folder or a name on the Hub, or a `.json` configuration, which gets random weights.

    Raises ChunkflowError when it cannot be loaded.
    """
    path, why = Path(name), None
    if path.is_file() and path.suffix != ".json":
        raise ChunkflowError(f"{name} is a file; give a model's folder or name, or a config.json for random weights")
    try:
        if path.suffix == ".json":
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        why = unreachable(name, "model") if not path.exists() and is_name(name) else None
        with offline(why):
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=why is not None)
    except Exception as error:  # the Hub, the network and models' own code raise anything
        here = (path / "config.json").is_file()
        hint = f" (for random weights give {path / 'config.json'})" if here else ""
        raise ChunkflowError(
            f"no causal LM could be loaded from {name!r}{hint}: {why or f'{type(error).__name__}: {error}'}"
        ) from error
