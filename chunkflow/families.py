"""Every causal LM family of the installed transformers, tiny and random: exact in chunks, or refused and why.

A family is a model type of transformers' `AutoModelForCausalLM`. Its default configuration is made small
(`tiny_config`) with what matters left in: each kind of layer once, windows shorter than the sequences that are tried,
experts, caps, sinks. Then `check_exact` compares gradients in chunks with those of whole sequences.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chunkflow.check import check_exact
from chunkflow.errors import ChunkflowError, UnsupportedModelError

EXACT, REFUSED, WRONG, UNTRIED = "exact", "refused", "NOT EXACT", "not tried"
TOLERANCE = 1e-6
"""Relative, in fp64: several families cast to fp32 in places that no switch reaches."""
MOST_PARAMETERS = 20_000_000
"""A model that is not this small is not tried."""
_WEIGHT_STD = 0.3
"""Of random weights: with transformers' own 0.02 scores are so small that attention would hardly matter."""

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 7, "window_size": 7, "local_attention": 7,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_shared_experts": 1, "n_shared_experts": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "embedding_size": 32, "word_embed_proj_dim": 32,
    "input_embedding_size": 32, "output_embedding_size": 32, "is_decoder": True, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8, "laurel_rank": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
}  # fmt: skip
"""What a configuration gets where its class has the field and a number in it."""

_SHARED = ["sliding_attention", "full_attention"] * 2  # the last two layers use keys and values of the first two
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SHARED,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SHARED},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single families need besides, by the model type of a configuration."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one family."""

    family: str
    model: str
    state: str
    """One of EXACT, REFUSED, WRONG, UNTRIED."""
    error: float | None
    """The worst relative error of a loss or gradient, where chunks were run."""
    reason: str
    """Why it was refused, where it is wrong, or why it was not tried."""


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return how many families are in each state."""
    found = Counter(verdict.state for verdict in verdicts)
    return {state: found[state] for state in (EXACT, REFUSED, WRONG, UNTRIED)}


def table(verdicts: Iterable[Verdict]) -> Table:
    """Return the table that the command prints."""
    shown = Table("family", "model", "in chunks", "error", "why")
    for v in verdicts:
        shown.add_row(v.family, v.model, v.state, "" if v.error is None else f"{v.error:.0e}", escape(v.reason))
    return shown


def markdown(verdicts: Iterable[Verdict]) -> str:
    """Return the table of a documentation page; errors are left out, since they differ by machine."""
    rows = [f"| `{v.family}` | {v.model} | {v.state} | {_in_a_cell(v.reason)} |" for v in verdicts]
    return "\n".join(["| family | model | in chunks | why |", "|---|---|---|---|", *rows, ""])


def _in_a_cell(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;")


def family_names() -> list[str]:
    """Return the model types of the installed transformers that have a causal LM, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_families(names: Iterable[str]) -> Iterator[Verdict]:
    """Try families one after another, in this process. Raises ChunkflowError, behind them, on names that are none."""
    names = list(names)
    unknown = sorted(set(names) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    for name in names:
        if name not in unknown:
            with _quiet():
                yield _try(name)
    if unknown:
        raise ChunkflowError(f"{', '.join(unknown)}: no causal LM of the installed transformers has this model type")


def _try(name: str) -> Verdict:
    model_name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    try:
        model = tiny_model(name)
        _run_whole(model)
    except Exception as error:  # noqa: BLE001 (a family's own code raises anything)
        return Verdict(name, model_name, UNTRIED, None, _one_line(error))
    try:
        report = check_exact(model, chunk_tokens=16, num_chunks=(3,), tolerance=TOLERANCE)
    except UnsupportedModelError as error:
        return Verdict(name, model_name, REFUSED, None, _one_line(error, named=False))
    except Exception as error:  # noqa: BLE001 (accepted, and then it failed: a fault of ours)
        return Verdict(name, model_name, WRONG, None, _one_line(error))
    worst = max(report.comparisons, key=lambda c: max(c.loss_error, c.gradient_error))
    size = max(worst.loss_error, worst.gradient_error)
    if report.exact:
        return Verdict(name, model_name, EXACT, size, "")
    return Verdict(name, model_name, WRONG, size, f"{worst.worst_parameter} at retain {worst.retain}")


def tiny_model(name: str) -> PreTrainedModel:
    """Make the tiny model of a family, with random weights that are the same every time.

    Raises ChunkflowError when it does not get small enough, and whatever the family's own code raises.
    """
    kind = CONFIG_MAPPING[name]
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(kind)).parameters())
    if size > MOST_PARAMETERS:
        raise ChunkflowError(f"its tiny configuration still has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=_WEIGHT_STD)
    return model


@torch.no_grad()
def _run_whole(model: PreTrainedModel) -> None:
    """Run a few tokens through the family's own code: what fails here says nothing about chunks."""
    model.eval()(input_ids=torch.arange(3, 8)[None], use_cache=False)


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a small configuration of a class: sizes of `_SIZES` where it has the field, each kind of layer once."""
    default = kind()
    sizes = {name: value for name, value in _SIZES.items() if isinstance(_field(default, name), int)}
    if "qk_rope_head_dim" in sizes:  # latent attention has no groups of heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    kinds = _field(default, "layer_types")
    if isinstance(kinds, list):
        sizes["layer_types"] = _each_once(kinds)
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    parts: Any = kind.sub_configs
    for name in parts:
        part = _field(default, name)
        if isinstance(part, PreTrainedConfig):
            sizes[name] = tiny_config(type(part))
    return kind(**{**sizes, **_FAMILIES.get(kind.model_type, {})})


def _field(config: PreTrainedConfig, name: str) -> Any:
    """Return a field of a configuration; None where it has none that can be set for all layers."""
    name = config.attribute_map.get(name, name)
    if isinstance(getattr(type(config), name, None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 (some differ by layer, and say so with errors of their own)
        return None


def _each_once(kinds: list[str]) -> list[str]:
    """Return each kind of layer once, in order; one kind twice."""
    distinct = list(dict.fromkeys(kinds))
    return distinct if len(distinct) > 1 else distinct * 2


def _one_line(error: Exception, *, named: bool = True) -> str:
    """Return an error in a line, the same on every machine: without the rounding of its numbers."""
    text = re.sub(r"\d\.\d+e[+-]\d+", "...", " ".join(str(error).split()))
    return (f"{type(error).__name__}: {text}" if named else text)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what families warn about: missing kernels, settings that a tiny configuration does not have."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
