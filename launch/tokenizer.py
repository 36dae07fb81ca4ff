"""A byte-pair tokenizer for a new model, trained on the corpus in seconds, and cached."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
    folder = cache / "tokenizers" / digest.hexdigest()
    if folder.exists() and not _loads(folder):
        shutil.rmtree(folder)
    if not folder.exists():
        _publish(_train(iter(texts()), vocab_size), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _loads(folder: Path) -> bool:
    try:
        PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception:  # noqa: BLE001 (tokenizers raises nothing more special for a damaged file)
        return False
    return True


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


def _publish(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
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
