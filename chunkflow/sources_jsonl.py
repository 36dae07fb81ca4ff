"""A file of JSON lines as a data set: each line one sample, as text or as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from chunkflow.cache import open_or_build
from chunkflow.errors import SourceError
from chunkflow.index import FORMAT_VERSION, Row, StoredSource, digest_file
from chunkflow.tokenizing import Text, encode, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


class JsonLines(StoredSource):
    """One JSON object a line; a `Source`.

    A line with `input_ids` (a list of token ids) is taken as it is, with `labels` if it has them: as many as tokens,
    not shifted, -100 where there is no target. Any other line needs a text in `field`, which is tokenized and ended by
    the tokenizer's eos token. `tokenizer` may be None when no line is text. `progress` is called with the bytes read
    and the bytes in all while the tokens are first stored under `cache_dir`.

    Raises SourceError with file and line number on a line that is none of these, on a file that changes meanwhile, or
    when there is nothing to train on. Blank lines are left out and counted in `skipped`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        cache_dir: str | Path,
        field: str = "text",
        progress: Progress | None = None,
    ) -> None:
        path = Path(path)
        try:
            digest = digest_file(path)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error}") from error
        description = {
            "kind": "JsonLines",
            "format": FORMAT_VERSION,
            "file": digest,
            "field": field,
            "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        }

        def rows() -> Iterator[Row]:
            items = (_item(name, line, field, tokenizer) for name, line in _lines(path, digest, progress))
            return encode(items, tokenizer)

        super().__init__(open_or_build(Path(cache_dir), description, rows))


def _item(name: str, line: bytes, field: str, tokenizer: PreTrainedTokenizerBase | None) -> Row | Text:
    """Return what a line holds; `name` is its file and number."""
    if not line.strip():
        return Row(name, np.empty(0, dtype=np.int64), skip="blank line")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise SourceError(f"{name}: a {type(values).__name__}; each line must be one JSON object")
    if "input_ids" in values:
        return _tokens(name, values)
    if field not in values:
        raise SourceError(f"{name}: neither {field!r} nor 'input_ids' among its fields {sorted(values)}; set field=")
    return _text(name, values[field], field, tokenizer)


def _text(name: str, text: Any, field: str, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    if not isinstance(text, str):
        raise SourceError(f"{name}: {field!r} is a {type(text).__name__}; it must be a string")
    if tokenizer is None:
        raise SourceError(f"{name}: a text, and no tokenizer was given; give one, or lines with input_ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{name}: {field!r} is no valid Unicode ({error.reason} at character {error.start})"
        ) from error
    return Text(name, text)


def _tokens(name: str, values: dict[str, Any]) -> Row:
    input_ids = _integers(name, "input_ids", values["input_ids"])
    labels = values.get("labels")
    if labels is None:
        return Row(name, input_ids)
    labels = _integers(name, "labels", labels)
    if len(labels) != len(input_ids):
        raise SourceError(f"{name}: {len(labels)} labels for {len(input_ids)} input_ids; there must be one for each")
    return Row(name, input_ids, labels)


def _integers(name: str, field: str, values: Any) -> np.ndarray:
    """Return int64 [L]."""
    if not isinstance(values, list):
        raise SourceError(f"{name}: {field!r} is a {type(values).__name__}; it must be a list of whole numbers")
    wrong = [value for value in values if type(value) is not int]
    if wrong:
        raise SourceError(f"{name}: {field!r} holds {wrong[0]!r}; it must be a list of whole numbers")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise SourceError(f"{name}: {field!r} holds a number beyond 64 bits; token ids are below 2**31") from error


def _lines(path: Path, digest: str, progress: Progress | None) -> Iterator[tuple[str, bytes]]:
    """Yield each line with its name; raises SourceError when the file is no longer the one of the digest."""
    total, num_bytes, seen = path.stat().st_size, 0, xxhash.xxh3_128()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            seen.update(line)
            num_bytes += len(line)
            if num_bytes > total:  # it grows as we read, perhaps for ever
                break
            yield f"{path}:{number}", line
            if progress:
                progress(num_bytes, total)
    if seen.hexdigest() != digest:
        raise SourceError(f"{path} changed while it was being read; let it come to rest and start again")
