"""A conversation to tokens, and which of them the assistant said: only those are targets.

A template with `{% generation %}` marks them itself. For any other, what the assistant says in a turn is what rendering
one message more appends, beyond the prompt that asks for it; where the template does not append (some drop the thinking
of earlier turns), there is no exact mask, and the sample is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkflow.errors import NoTokenizerError, SourceError
from chunkflow.index import Row
from chunkflow.sources import NO_TARGET

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TORN = "a token stands across the border of what the assistant says"


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation that is not tokenized yet."""

    name: str
    messages: Sequence[Mapping[str, Any]]
    tools: list[Any] | None = None
    prompt_messages: int = 0
    """So many messages are prompt: not even the assistant's among them are targets."""


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return the conversation as the template renders it, with the assistant's tokens as labels.

    Raises SourceError, naming the sample, when the template fails or no exact mask exists.
    """
    return encode_chats([chat], tokenizer)[0]


def encode_chats(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return `encode_chat` of each; the tokenizer is called once, and works on all cores."""
    rows: dict[int, Row] = {}
    rendered: dict[int, _Rendered] = {}
    for number, chat in enumerate(chats):
        template = _template(chat.name, tokenizer)
        if not _MARKED.search(template) or chat.prompt_messages:
            rendered[number] = _render(chat, tokenizer)
        else:
            rows[number] = _marked(chat, tokenizer)
    found = zip(rendered, _tokenized(list(rendered.values()), tokenizer), strict=True)
    rows |= {number: _labelled(rendered[number], ids, offsets) for number, (ids, offsets) in found}
    return [rows[number] for number in range(len(chats))]


def _marked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Row:
    encoded: Any = _apply(
        chat, tokenizer, chat.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    said = np.array(encoded["assistant_masks"], dtype=bool)
    return Row(chat.name, ids, np.where(said, ids, NO_TARGET))


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text, and from which to which character the assistant speaks."""

    name: str
    text: str
    spans: list[tuple[int, int]]


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    whole: str = _apply(chat, tokenizer, chat.messages, tokenize=False)
    spans = [
        _span(chat, tokenizer, turn, whole)
        for turn, message in enumerate(chat.messages)
        if message["role"] == "assistant" and turn >= chat.prompt_messages
    ]
    return _Rendered(chat.name, whole, spans)


def _tokenized(some: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[Any]]]:
    """Return ids and character offsets of each text."""
    if not some:
        return []
    options: dict[str, Any] = {
        "add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False,
        "truncation": False, "padding": False, "verbose": False,
    }  # fmt: skip
    try:
        encoded = tokenizer([one.text for one in some], **options)
    except Exception as error:  # whatever a tokenizer raises, it is named with its sample
        if len(some) > 1:
            return [found for one in some for found in _tokenized([one], tokenizer)]
        raise SourceError(f"{some[0].name}: the tokenizer failed: {type(error).__name__}: {error}") from error
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _labelled(rendered: _Rendered, input_ids: list[int], offsets: list[Any]) -> Row:
    ids = np.array(input_ids, dtype=np.int64)
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    said = np.zeros(len(ids), dtype=bool)
    for first, last in rendered.spans:
        inside = (begin >= first) & (end <= last) & (end > begin)
        touches = (begin < last) & (end > first)
        if (touches & ~inside).any():
            return Row(rendered.name, ids, skip=_TORN)
        said |= inside
    return Row(rendered.name, ids, np.where(said, ids, NO_TARGET))


def _span(chat: Chat, tokenizer: PreTrainedTokenizerBase, turn: int, whole: str) -> tuple[int, int]:
    """Return from which to which character the assistant speaks in one turn."""
    if turn == 0:  # transformers renders no empty conversation
        raise SourceError(
            f"{chat.name}: the assistant speaks first, so there is nothing to tell from where its words begin; put a "
            "message of another role before it, mark the assistant's tokens in the template with {% generation %}, or "
            "give input_ids and labels"
        )
    asked: str = _apply(chat, tokenizer, chat.messages[:turn], tokenize=False, add_generation_prompt=True)
    last = turn + 1 == len(chat.messages)
    answered: str = whole if last else _apply(chat, tokenizer, chat.messages[: turn + 1], tokenize=False)
    if not (answered.startswith(asked) and whole.startswith(answered)):
        raise SourceError(
            f"{chat.name}: this chat template renders message {turn} differently when others follow, so the "
            "assistant's tokens cannot be told exactly; mark them in the template with {% generation %}, or give "
            "input_ids and labels"
        )
    return len(asked), len(answered)


def _apply(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], tools=chat.tools, **options)
    except Exception as error:  # whatever a template raises, it is named with its sample
        raise SourceError(f"{chat.name}: the chat template failed: {type(error).__name__}: {error}") from error


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise NoTokenizerError(
            f"{name}: messages, and {type(tokenizer).__name__} has {'several' if template else 'no'} chat "
            "template" + ("s; set tokenizer.chat_template to one of them" if template else "; set one")
        )
    return template


def checked_messages(name: str, field: str, messages: Any) -> list[Mapping[str, Any]]:
    """Return a list of messages, each with a role; raises SourceError on anything else."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise SourceError(f"{name}: {field!r} is {_shown(messages)}; it must be a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SourceError(f"{name}: {field!r} holds {_shown(message)}; a message has a role, and content")
        if not _says_something(message):
            raise SourceError(
                f"{name}: message {number} of {field!r}, of role {message['role']!r}, has no content (it is null or "
                "missing) and no tool calls; write what was said, if only an empty string, or leave the record out"
            )
        if isinstance(message.get("content"), int | float):
            raise SourceError(f"{name}: the content of message {number} of {field!r} is a number; it must be a string")
        if message.get("weight") not in (None, 1):  # trained all the same, it would be what the data says not to do
            raise SourceError(
                f"{name}: message {number} of {field!r} has the weight {_shown(message['weight'])}, and every message "
                "of an assistant is trained alike; leave the record out, or give input_ids and labels"
            )
    # Arrow fills in the keys that a message does not have.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _says_something(message: Mapping[str, Any]) -> bool:
    others = [value for key, value in message.items() if key not in ("role", "name", "content", "tool_call_id")]
    return message.get("content") is not None or any(others)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
