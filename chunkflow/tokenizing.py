"""Texts to tokens, in batches, and what of a tokenizer decides them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from chunkflow.errors import SourceError
from chunkflow.index import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_SIZE, _BATCH_ITEMS = 1 << 20, 256


@dataclass(frozen=True, slots=True)
class Text:
    """One sample that is not tokenized yet."""

    name: str
    text: str


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the xxh3 hex digest of everything that decides the tokens of a text.

    Raises SourceError on a tokenizer that cannot say what it is, or has no token to end a text with.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens cannot be identified; "
            "use the fast one, or give JsonLines samples with input_ids"
        )
    if tokenizer.eos_token_id is None:
        raise SourceError(
            f"{type(tokenizer).__name__} has no eos_token, which ends every text; set tokenizer.eos_token to a token "
            "that the model knows"
        )
    parts = json.loads(backend.to_str())
    # The last call's truncation and padding are kept here too; ours sets its own.
    parts.pop("truncation", None)
    parts.pop("padding", None)
    parts["eos_token_id"] = tokenizer.eos_token_id
    parts["split_special_tokens"] = bool(getattr(tokenizer, "split_special_tokens", False))
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def encode(items: Iterable[Row | Text], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    """Yield rows in the order of the items: a row as it is, a text whole and ended by the eos token.

    `tokenizer` may be None when no item is a text.
    """
    batch: list[Row | Text] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text) if isinstance(item, Text) else len(item.input_ids)
        if size >= _BATCH_SIZE or len(batch) == _BATCH_ITEMS:
            yield from _encode_batch(batch, tokenizer)
            batch, size = [], 0
    yield from _encode_batch(batch, tokenizer)


def _encode_batch(batch: list[Row | Text], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    texts = [item.text for item in batch if isinstance(item, Text)]
    ids = iter(_encode_texts(texts, tokenizer) if texts and tokenizer is not None else [])
    for item in batch:
        yield item if isinstance(item, Row) else Row(item.name, next(ids))


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    encoded = tokenizer(
        texts,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about model_max_length: samples are split, not cut
    )
    eos = tokenizer.eos_token_id
    for ids in encoded["input_ids"]:
        # Some tokenizers end every text themselves.
        yield np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int64)
