"""What `benchmarks.job` trains: a cut of SmolLM2, a long-tailed mix, and rows of equal lengths; made once, and kept.

L tokens of one sample
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from chunkflow import JsonLines
from chunkflow.sources import Sample
from launch.config import DataConfig, ModelConfig
from launch.corpus import choose_files
from launch.files import replace_folder, write_lines
from launch.functions import write_functions
from launch.model import llama_config
from launch.pretrained import SMOLLM2, pretrained_model, pretrained_tokenizer
from launch.tokenizer import trained_tokenizer

CACHE = Path("runs/cache/job")
LARGEST_BYTES, QUICK_LARGEST_BYTES = 12_288, 4_096
"""Of one function or class; the first is the recipe's."""
_SPARE = 16
"""Samples drawn beyond those wanted: some have nothing to score, and are left out."""
_SMALL = ModelConfig(vocab_size=1024, hidden_size=64, intermediate_size=192, num_layers=2, max_positions=8192)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A data file of tokens."""

    path: Path
    samples: tuple[dict[str, list[int]], ...]
    """`input_ids` and unshifted `labels` of each line."""

    @property
    def lengths(self) -> list[int]:
        """In tokens."""
        return [len(sample["input_ids"]) for sample in self.samples]

    @property
    def scored(self) -> int:
        """Targets of all samples: the useful tokens."""
        return sum(label != -100 for sample in self.samples for label in sample["labels"][1:])


def model_folder(*, quick: bool, layers: int = 4) -> Path:
    """Return the folder of the first layers of SmolLM2, real weights; of a tiny model with random ones if `quick`."""
    folder = CACHE / ("tiny" if quick else f"smollm2-{layers}-layers")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = _tiny() if quick else _cut(layers)

        def fill(path: Path) -> None:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)

        replace_folder(folder, fill)
    return folder


def _cut(layers: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    whole: Any = pretrained_model(SMOLLM2)
    whole.model.layers = whole.model.layers[:layers]
    whole.config.num_hidden_layers = layers
    return whole, pretrained_tokenizer(SMOLLM2, cache=CACHE)


def _tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    texts = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    tokenizer = trained_tokenizer(lambda: texts, vocab_size=_SMALL.vocab_size, cache=CACHE)
    assert tokenizer is not None
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(_SMALL, tokenizer)), tokenizer


def mix(model: Path, *, count: int, quick: bool) -> Tokens:
    """Return `count` functions and classes of the standard library as tokens, the largest among them.

    As in recipes/smollm2.yaml: those with a docstring as chats, of which only the answer is scored, the others whole.
    """
    limit = QUICK_LARGEST_BYTES if quick else LARGEST_BYTES
    path = CACHE / f"mix-{model.name}-{count}-{limit}.jsonl"
    if not path.exists():
        choice = choose_files(replace(DataConfig(kind="functions"), max_file_bytes=None, long_files=()))
        written = write_functions(choice, max_bytes=limit, held_out=0, seed=0, cache=CACHE)
        lines = drawn(written.train.read_text(encoding="utf-8").splitlines(), count + _SPARE, seed=0)
        tokenizer = pretrained_tokenizer(str(model), cache=CACHE)
        if tokenizer.chat_template is None:
            lines = [_without_template(line) for line in lines]
        drawn_path = path.with_suffix(".texts")
        write_lines(drawn_path, lines)
        source = JsonLines(drawn_path, tokenizer, cache_dir=CACHE)
        write_lines(path, [json.dumps(unshifted(source.read(index))) for index in range(count)])
    return read_tokens(path)


def drawn(lines: Sequence[str], count: int, *, seed: int) -> list[str]:
    """Return `count` different lines, drawn by the seed, the longest of all in the place of the first."""
    chosen = np.random.default_rng(seed).permutation(len(lines))[:count].tolist()
    longest = max(range(len(lines)), key=lambda index: len(lines[index]))
    if longest not in chosen:
        chosen[0] = longest
    return [str(lines[index]) for index in chosen]


def _without_template(line: str) -> str:
    record = json.loads(line)
    if "messages" not in record:
        return line
    asked, answer = (message["content"] for message in record["messages"])
    return json.dumps({"prompt": asked, "completion": answer})


def unshifted(sample: Sample) -> dict[str, list[int]]:
    """Return a sample as transformers takes it: labels [L] stand at their own tokens."""
    return {"input_ids": sample.input_ids.tolist(), "labels": [-100, *sample.shift_labels[:-1].tolist()]}


def equal(model: Path, *, rows: int, length: int, quick: bool) -> Tokens:
    """Return rows of exactly `length` tokens, every token but the first scored, cut from a mix."""
    path = CACHE / f"equal-{model.name}-{rows}-{length}.jsonl"
    if not path.exists():
        stream = _stream(mix(model, count=256, quick=quick))
        cut = [[next(stream) for _ in range(length)] for _ in range(rows)]
        write_lines(path, [json.dumps({"input_ids": ids, "labels": ids}) for ids in cut])
    return read_tokens(path)


def _stream(tokens: Tokens) -> Iterator[int]:
    while True:
        for sample in tokens.samples:
            yield from sample["input_ids"]


def read_tokens(path: Path) -> Tokens:
    """Return a data file of tokens."""
    return Tokens(path, tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()))


def flags(settings: Mapping[str, object]) -> list[str]:
    """Return settings by dotted key as flags of launch.finetune."""
    found: list[str] = []
    for key, value in settings.items():
        found += [f"--{key}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return found
