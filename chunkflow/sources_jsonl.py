"""Files of JSON lines as a data set: each line one sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from chunkflow.cache import open_or_build
from chunkflow.config import CACHE_DIR
from chunkflow.errors import SourceError
from chunkflow.index import FORMAT_VERSION, Row, StoredSource, digest_file
from chunkflow.records_raw import Item, item_of
from chunkflow.tokenizing import encode, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


class JsonLines(StoredSource):
    """One JSON object a line, of a file or of all `*.jsonl` of a folder in sorted order; a `Source`.

    A line holds tokens, a conversation, a prompt and its completion, or a text in `field` (`chunkflow.records_raw` has
    the formats). `tokenizer` may be None when every line holds tokens. `progress` is called with the bytes read
    and the bytes in all while the tokens are first stored under `cache_dir`.

    Raises SourceError with file and line number on a line that is none of these, on a file that changes meanwhile, or
    when there is nothing to train on. Blank lines are left out and counted in `skipped`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        cache_dir: str | Path = CACHE_DIR,
        field: str = "text",
        progress: Progress | None = None,
    ) -> None:
        path = Path(path)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise SourceError(f"{path} is a folder without *.jsonl files")
        digests = [_digest(file) for file in files]
        description = {
            "kind": "JsonLines",
            "format": FORMAT_VERSION,
            **({"files": digests} if path.is_dir() else {"file": digests[0]}),
            "field": field,
            "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        }

        def rows() -> Iterator[Row]:
            if not any(file.stat().st_size for file in files):
                raise SourceError(f"{path} has 0 lines; there is nothing to train on")
            lines = _lines(dict(zip(files, digests, strict=True)), progress)
            return encode((_item(name, line, field, tokenizer) for name, line in lines), tokenizer)

        super().__init__(open_or_build(Path(cache_dir), description, rows))


def _item(name: str, line: bytes, field: str, tokenizer: PreTrainedTokenizerBase | None) -> Item:
    """Return what a line holds; `name` is its file and number."""
    if not line.strip():
        return Row(name, np.empty(0, dtype=np.int64), skip="blank line")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise SourceError(f"{name}: a {type(values).__name__}; each line must be one JSON object")
    return item_of(name, values, field, tokenizer)


def _digest(file: Path) -> str:
    try:
        return digest_file(file)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error}") from error


def _lines(digests: Mapping[Path, str], progress: Progress | None) -> Iterator[tuple[str, bytes]]:
    """Yield each line of the files with its name; raises SourceError when one is no longer that of its digest."""
    total, done = sum(path.stat().st_size for path in digests), 0
    for path, digest in digests.items():
        for name, line in _lines_of(path, digest):
            yield name, line
            done += len(line)
            if progress:
                progress(done, total)


def _lines_of(path: Path, digest: str) -> Iterator[tuple[str, bytes]]:
    total, num_bytes, seen = path.stat().st_size, 0, xxhash.xxh3_128()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            seen.update(line)
            num_bytes += len(line)
            if num_bytes > total:  # it grows as we read, perhaps for ever
                break
            yield f"{path}:{number}", line
    if seen.hexdigest() != digest:
        raise SourceError(f"{path} changed while it was being read; let it come to rest and start again")
