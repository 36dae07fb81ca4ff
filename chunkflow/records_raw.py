"""One raw record of a data set (a JSON object, a row of a table) to what is tokenized, whatever format it came in.

input_ids, labels        taken as they are; labels as many as tokens, not shifted, -100 where there is no target
messages, tools          a conversation, see `chunkflow.chat`
prompt, completion       strings or lists of messages; only the completion is a target
any field, as text       tokenized whole
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from chunkflow.chat import Chat, checked_messages
from chunkflow.errors import NoTokenizerError, SourceError
from chunkflow.index import Row
from chunkflow.tokenizing import Pair, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_OBJECTS = ("messages", "tools", "prompt", "completion")
Item: TypeAlias = Row | Text | Pair | Chat


def item_of(name: str, values: Mapping[str, Any], field: str, tokenizer: PreTrainedTokenizerBase | None) -> Item:
    """Return what a record holds; `name` is its file and line. Raises SourceError when it is none of the above."""
    if values.get("input_ids") is not None:
        return _tokens(name, values)
    if values.get("messages") is not None:
        _require(tokenizer, name, "messages")
        return Chat(name, checked_messages(name, "messages", values["messages"]), _tools(name, values.get("tools")))
    if values.get("prompt") is not None and values.get("completion") is not None:
        _require(tokenizer, name, "a prompt")
        return _pair(name, values["prompt"], values["completion"])
    if field not in values:
        if half := sorted({"prompt", "completion"} & values.keys()):
            gone = [one for one in ("prompt", "completion") if values.get(one) is None]
            what = "is null" if gone[0] in values else "is missing"
            raise SourceError(f"{name}: {gone[0]!r} {what} beside {half}; a record has both, or a {field!r}")
        raise SourceError(
            f"{name}: neither {field!r} nor 'input_ids', 'messages' or 'prompt' and 'completion' among its fields "
            f"{sorted(values)}; set field="
        )
    _require_text(name, field, values[field])
    _require(tokenizer, name, "a text")
    return Text(name, values[field])


def of_table(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row without what Arrow filled in: in a column of objects each has the keys of all, or null.

    What is null itself stays, so that `item_of` can say so.
    """
    return {name: _without_nulls(value) if name in _OF_OBJECTS else value for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _tools(name: str, tools: Any) -> list[Any] | None:
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise SourceError(
            f"{name}: 'tools' is a {type(tools).__name__}; it must be a list of objects, the tools' schemas (not JSON "
            "in a string, but what it holds)"
        )
    return tools or None


def _require(tokenizer: PreTrainedTokenizerBase | None, name: str, what: str) -> None:
    if tokenizer is None:
        raise NoTokenizerError(f"{name}: {what}, and no tokenizer was given; give one, or records with input_ids")


def _require_text(name: str, field: str, text: Any) -> None:
    if not isinstance(text, str):
        raise SourceError(f"{name}: {field!r} is a {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{name}: {field!r} is no valid Unicode ({error.reason} at character {error.start})"
        ) from error


def _pair(name: str, prompt: Any, completion: Any) -> Pair | Chat:
    if isinstance(prompt, str) and isinstance(completion, str):
        _require_text(name, "prompt", prompt)
        _require_text(name, "completion", completion)
        return Pair(name, prompt, completion)
    asked = checked_messages(name, "prompt", prompt)
    return Chat(name, [*asked, *checked_messages(name, "completion", completion)], prompt_messages=len(asked))


def _tokens(name: str, values: Mapping[str, Any]) -> Row:
    input_ids = _integers(name, "input_ids", values["input_ids"])
    if values.get("labels") is None:
        return Row(name, input_ids)
    labels = _integers(name, "labels", values["labels"])
    if len(labels) != len(input_ids):
        raise SourceError(f"{name}: {len(labels)} labels for {len(input_ids)} input_ids; there must be one for each")
    return Row(name, input_ids, labels)


def _integers(name: str, field: str, values: Any) -> np.ndarray:
    """Return int64 [L]."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)
    if not isinstance(values, list):
        raise SourceError(f"{name}: {field!r} is a {type(values).__name__}; it must be a list of whole numbers")
    wrong = [value for value in values if type(value) is not int]
    if wrong:
        raise SourceError(f"{name}: {field!r} holds {wrong[0]!r}; it must be a list of whole numbers")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise SourceError(f"{name}: {field!r} holds a number beyond 64 bits; token ids are below 2**31") from error
