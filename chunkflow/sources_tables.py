"""Tables as data sets: Parquet files, and what the `datasets` library has opened. Each row is one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from chunkflow.cache import open_or_build
from chunkflow.config import CACHE_DIR
from chunkflow.errors import SourceError
from chunkflow.index import FORMAT_VERSION, Row, StoredSource, digest_file
from chunkflow.records_raw import item_of, of_table
from chunkflow.tokenizing import encode, tokenizer_digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
_ROWS = 1000
_READ = 2
"""Counts the ways in which rows were read, since a store of another way holds other tokens."""


class ParquetFiles(StoredSource):
    """A Parquet file, or all `*.parquet` of a folder in sorted order; a `Source`.

    Columns as in `chunkflow.records_raw`. `progress` is called with rows done and in all. Raises SourceError on a file
    that is no Parquet, or that changes while it is read.
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
        files = _parquet_files(Path(path))
        digests = [_digest(file) for file in files]
        description = _description("ParquetFiles", field, tokenizer, files=digests)

        def rows() -> Iterator[Row]:
            counts = [pq.read_metadata(file).num_rows for file in files]
            if not sum(counts):
                raise SourceError(f"{path} has 0 rows; there is nothing to train on")
            tables = (_named(file, digest) for file, digest in zip(files, digests, strict=True))
            return _rows((part for table in tables for part in table), sum(counts), field, tokenizer, progress)

        super().__init__(open_or_build(Path(cache_dir), description, rows))


class FromDataset(StoredSource):
    """A `datasets.Dataset`; a `Source`, identified by its contents.

    Columns as in `chunkflow.records_raw`; its order is the data set's own, indices included. `progress` is called with
    rows done and in all while the tokens are first stored.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        cache_dir: str | Path = CACHE_DIR,
        field: str = "text",
        progress: Progress | None = None,
    ) -> None:
        if dataset.format["type"] == "custom":
            raise SourceError(
                "the data set has a transform that runs as rows are read (set_transform), and tokens are stored once; "
                "use map in its place"
            )
        if len(dataset) == 0:
            raise SourceError("the data set has 0 rows; there is nothing to train on")
        plain = dataset.with_format("arrow")
        digest = xxhash.xxh3_128()
        for table in _tables(plain):
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
        description = _description("Dataset", field, tokenizer, contents=digest.hexdigest(), rows=len(dataset))

        def rows() -> Iterator[Row]:
            return _rows((("row", table) for table in _tables(plain)), len(dataset), field, tokenizer, progress)

        super().__init__(open_or_build(Path(cache_dir), description, rows))


def _description(kind: str, field: str, tokenizer: PreTrainedTokenizerBase | None, **identity: Any) -> dict[str, Any]:
    digest = None if tokenizer is None else tokenizer_digest(tokenizer)
    return {"kind": kind, "format": FORMAT_VERSION, "read": _READ, **identity, "field": field, "tokenizer": digest}


def _rows(
    tables: Iterable[tuple[str, pa.Table]],
    total: int,
    field: str,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress | None,
) -> Iterator[Row]:
    def items() -> Iterator[Any]:
        done, numbers = 0, {}
        for name, table in tables:
            for values in table.to_pylist():
                number = numbers[name] = numbers.get(name, -1) + 1
                yield item_of(f"{name} {number}", of_table(values), field, tokenizer)
            done += table.num_rows
            if progress:
                progress(done, total)

    return encode(items(), tokenizer)


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    for start in range(0, len(dataset), _ROWS):
        table: Any = dataset[start : start + _ROWS]
        yield table


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise SourceError(f"{path} is a folder without *.parquet files")
    return files


def _digest(file: Path) -> str:
    try:
        pq.read_metadata(file)
        return digest_file(file)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{file} cannot be read as Parquet: {error}") from error


def _named(file: Path, digest: str) -> Iterator[tuple[str, pa.Table]]:
    """Yield a file piece by piece; raises SourceError when it is no longer the one of the digest."""
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS):
                yield f"{file}: row", pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{file} cannot be read to its end: {error}; did it change?") from error
    if digest_file(file) != digest:
        raise SourceError(f"{file} changed while it was being read; let it come to rest and start again")
