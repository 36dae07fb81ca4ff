"""A folder of text files as a data set: each file one sample, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from chunkflow.cache import open_or_build
from chunkflow.config import CACHE_DIR
from chunkflow.errors import SourceError
from chunkflow.index import FORMAT_VERSION, StoredSource
from chunkflow.matching import matching
from chunkflow.tokenizing import Text, encode, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called while a store is built, with the bytes of text read so far and the bytes in all."""


class TextFolder(StoredSource):
    """Every UTF-8 file of a folder, in sorted order, ended by the tokenizer's eos token; a `Source`.

    `pattern` is a glob relative to `path`; a file whose relative path matches one of `exclude` is left out, where `*`
    matches across folders (`fnmatch`). The tokens are cached under `cache_dir`, by the files' names and contents and
    the tokenizer; all files are read once to find that out. Files below `cache_dir` are never samples.

    Raises SourceError on a file that is not UTF-8, one that changes meanwhile, or when there is nothing to train on.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache_dir: str | Path = CACHE_DIR,
        pattern: str = "**/*",
        exclude: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> None:
        root, cache = Path(path), Path(cache_dir)
        exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        files = [_identify(root, name) for name in _find(root, pattern, exclude, cache)]
        contents = "\n".join(f"{file.digest} {file.name}" for file in files).encode(errors="surrogateescape")
        description = {
            "kind": "TextFolder",
            "format": FORMAT_VERSION,
            "files": f"{len(files)} files, {xxhash.xxh3_128_hexdigest(contents)}",
            "tokenizer": tokenizer_digest(tokenizer),
        }
        super().__init__(open_or_build(cache, description, lambda: encode(_texts(root, files, progress), tokenizer)))


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was when the data set was identified."""

    name: str
    digest: str
    num_bytes: int


def _find(root: Path, pattern: str, exclude: list[str], cache: Path) -> list[str]:
    """Return the files' paths relative to the root, with `/`, sorted."""
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder; TextFolder needs the folder that holds the text files")
    cache = cache.resolve()
    try:
        found = matching(root, pattern, exclude)
    except (ValueError, NotImplementedError) as error:  # an absolute or empty pattern, or one that leads out
        raise SourceError(f"the pattern {pattern!r} is not a glob relative to {root}: {error}") from error
    names = [name for name, p in found.items() if p.is_file() and cache not in p.resolve().parents]
    if not names:
        raise SourceError(f"no file of {root} matches {pattern!r} and is not excluded by {exclude}")
    return names


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _identify(root: Path, name: str) -> _File:
    content = _read(root / name)
    return _File(name, xxhash.xxh3_128_hexdigest(content), len(content))


def _texts(root: Path, files: list[_File], progress: Progress | None) -> Iterator[Text]:
    total, num_bytes = sum(file.num_bytes for file in files), 0
    for file in files:
        path = root / file.name
        content = _read(path)
        if xxhash.xxh3_128_hexdigest(content) != file.digest:
            raise SourceError(f"{path} changed while it was being read; let it come to rest and start again")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it, or exclude it"
            ) from error
        yield Text(file.name, text)
        num_bytes += file.num_bytes
        if progress:
            progress(num_bytes, total)
