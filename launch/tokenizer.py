"""Tokenizers that take seconds, and are kept: trained on the corpus for a new model, or read from a GGUF file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
_VERSION = 1


def trained_tokenizer(
    texts: Callable[[], Iterable[str]], *, vocab_size: int, cache: Path
) -> PreTrainedTokenizerBase | None:
    """Return a byte-level byte-pair tokenizer of these texts, from `cache` if it was trained before.

    `texts` is called twice: to identify the texts, and to train on them. Returns None when there are none. What is in
    the cache and does not load is trained again.
    """
    digest, count = xxhash.xxh3_128(f"{_VERSION} {vocab_size} {EOS}".encode()), 0
    for text in texts():
        digest.update(f"{len(text)} {text}".encode("utf-8", "replace"))
        count += 1
    if not count:
        return None
    return kept_tokenizer(cache, digest.hexdigest(), lambda: _train(iter(texts()), vocab_size))


def kept_tokenizer(cache: Path, name: str, make: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of this name in `cache`, made and put there when there is none that loads.

    It is always the one of the cache that is returned, also to the process that made it.
    """
    folder = cache / "tokenizers" / name
    was_there = folder.exists()
    found = _load(folder) if was_there else None
    if found is None:
        if was_there:  # or another process may just have put it there
            shutil.rmtree(folder, ignore_errors=True)
        _publish(make(), folder)
        found = AutoTokenizer.from_pretrained(folder)
    return found


def _load(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # noqa: BLE001 (tokenizers raises nothing more special for a damaged file)
        return None


def _train(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def _publish(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put a tokenizer in its place at once; another process may have been faster, with the same one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(prefix="tmp-", dir=folder.parent)
    try:
        tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
