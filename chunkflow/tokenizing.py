"""Texts to tokens, in batches, and what of a tokenizer decides them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from chunkflow.chat import Chat, encode_chats
from chunkflow.errors import SourceError
from chunkflow.index import Row
from chunkflow.sources import NO_TARGET

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_SIZE, _BATCH_ITEMS = 1 << 20, 256


@dataclass(frozen=True, slots=True)
class Text:
    """One sample that is not tokenized yet."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and what should follow it, the only target."""

    name: str
    prompt: str
    completion: str


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
    parts["chat_template"] = tokenizer.chat_template
    parts["eos_token_id"] = tokenizer.eos_token_id
    parts["split_special_tokens"] = bool(getattr(tokenizer, "split_special_tokens", False))
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def encode(items: Iterable[Row | Text | Pair | Chat], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    """Yield rows in the order of the items: a row as it is, a text or a completion ended by the eos token.

    `tokenizer` may be None when every item is a row.
    """
    batch: list[Row | Text | Pair | Chat] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text) if isinstance(item, Text) else 256
        if size >= _BATCH_SIZE or len(batch) == _BATCH_ITEMS:
            yield from _encode_batch(batch, tokenizer)
            batch, size = [], 0
    yield from _encode_batch(batch, tokenizer)


def _encode_batch(batch: list[Row | Text | Pair | Chat], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    if tokenizer is None:
        yield from (item for item in batch if isinstance(item, Row))
        return
    texts = iter(_ids([item for item in batch if isinstance(item, Text)], tokenizer))
    pairs = [item for item in batch if isinstance(item, Pair)]
    prompts = iter(_ids([Text(pair.name, pair.prompt) for pair in pairs], tokenizer))
    # What the model is asked for begins behind the prompt's last token, so the two are never tokenized as one.
    answers = [Text(pair.name, pair.completion) for pair in pairs]
    completions = iter(_ids(answers, tokenizer, add_special_tokens=False))
    chats = iter(encode_chats([item for item in batch if isinstance(item, Chat)], tokenizer))
    for item in batch:
        if isinstance(item, Row):
            yield item
        elif isinstance(item, Text):
            yield Row(item.name, _ended(next(texts), tokenizer))
        elif isinstance(item, Pair):
            yield _completed(item.name, next(prompts), next(completions), tokenizer)
        else:
            yield next(chats)


def _ids(texts: list[Text], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> list[list[int]]:
    """Return the tokens of each text; raises SourceError, naming the first text on which the tokenizer fails."""
    if not texts:
        return []
    options: dict[str, Any] = {
        "add_special_tokens": add_special_tokens,
        "truncation": False,
        "padding": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,  # no warning about model_max_length: samples are split, not cut
    }
    try:
        return tokenizer([text.text for text in texts], **options)["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a tokenizer raises (in Rust, not even an Exception), its sample is named
        for text in texts if len(texts) > 1 else ():
            _ids([text], tokenizer, add_special_tokens=add_special_tokens)
        names = texts[0].name if len(texts) == 1 else f"{texts[0].name} to {texts[-1].name}"
        raise SourceError(f"{names}: the tokenizer failed: {type(error).__name__}: {error}") from error


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return int64 [L], ended by eos; some tokenizers end every text themselves."""
    eos = tokenizer.eos_token_id
    return np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int64)


def _completed(name: str, prompt: list[int], completion: list[int], tokenizer: PreTrainedTokenizerBase) -> Row:
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    ended = _ended(completion, tokenizer)
    ids = np.concatenate([np.array(prompt, dtype=np.int64), ended])
    labels = ids.copy()
    labels[: len(prompt)] = NO_TARGET
    return Row(name, ids, labels)
