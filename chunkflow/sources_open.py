"""Whatever a user calls data, opened as a source: a path, a name on the Hub, or a data set in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkflow.errors import SourceError
from chunkflow.index import StoredSource
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_tables import FromDataset, ParquetFiles
from chunkflow.sources_text import TextFolder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


def open_source(
    data: str | Path | Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    cache_dir: str | Path,
    split: str = "train",
    field: str = "text",
    progress: Progress | None = None,
) -> StoredSource:
    """Open data by what it looks like.

    A `.jsonl` or `.json` file of lines; a `.parquet` file, or a folder of them; a folder of `Dataset.save_to_disk`;
    any other folder is one of text files; a `datasets.Dataset`; any other string is a name on the Hub, of which `split`
    is taken. Raises SourceError when it cannot be opened, and for an `IterableDataset`, which `StreamLoader` trains.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    if not isinstance(data, str | Path):
        if not hasattr(data, "__len__"):
            raise SourceError(f"{type(data).__name__} has no rows by number; train it with StreamLoader")
        return FromDataset(data, tokenizer, field=field, **options)
    path = Path(data)
    if path.suffix in (".jsonl", ".json") and path.exists():
        return JsonLines(path, tokenizer, field=field, **options)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return ParquetFiles(path, tokenizer, field=field, **options)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        if tokenizer is None:
            raise SourceError(f"{path} is a folder of texts, and no tokenizer was given; give one")
        return TextFolder(path, tokenizer, **options)
    if path.is_file():
        raise SourceError(f"{path}: data files end in .jsonl or .parquet")
    return FromDataset(_load(path, str(data), split), tokenizer, field=field, **options)


def _load(path: Path, name: str, split: str) -> Dataset:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, split=split)
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[split]
    except Exception as error:  # the Hub, the network and data sets' own code raise anything
        raise SourceError(
            f"{name!r} is neither a file nor a folder here, nor a data set that can be loaded with split {split!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    assert isinstance(loaded, datasets.Dataset)
    return loaded
