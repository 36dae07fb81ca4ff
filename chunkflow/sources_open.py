"""Whatever a user calls data, opened as a source: a path, a name on the Hub, or a data set in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkflow.config import CACHE_DIR
from chunkflow.errors import NoTokenizerError, SourceError
from chunkflow.hub import is_name, unreachable
from chunkflow.index import StoredSource
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_tables import FromDataset, ParquetFiles
from chunkflow.sources_text import TextFolder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


def open_source(
    data: str | Path | Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    cache_dir: str | Path = CACHE_DIR,
    split: str = "train",
    field: str = "text",
    progress: Progress | None = None,
) -> StoredSource:
    """Open data by what it looks like.

    A `.jsonl` or `.json` file of lines, or a folder with `.jsonl` files; a `.parquet` file, or a folder of them; a
    folder of `Dataset.save_to_disk`; any other folder is one of text files, and has no such tables further down; a
    `datasets.Dataset`; any other string is a name on the Hub. Of what has splits, `split` is taken. Raises SourceError
    when it cannot be opened, and for an `IterableDataset`, which `StreamLoader` trains.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    if not isinstance(data, str | Path):
        return FromDataset(_of_rows(data, split), tokenizer, field=field, **options)
    path = Path(data)
    _require_one_kind(path)
    if path.suffix == ".parquet" or _holds(path, "*.parquet"):
        return ParquetFiles(path, tokenizer, field=field, **options)
    if (path.suffix in (".jsonl", ".json") and path.exists()) or _holds(path, "*.jsonl"):
        return JsonLines(path, tokenizer, field=field, **options)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        if tokenizer is None:
            raise NoTokenizerError(f"{path} is a folder of texts, and no tokenizer was given; give one")
        _require_texts(path)
        return TextFolder(path, tokenizer, **options)
    if path.is_file():
        raise SourceError(f"{path}: data files end in .jsonl or .parquet")
    return FromDataset(_load(path, str(data), split), tokenizer, field=field, **options)


def _holds(path: Path, pattern: str) -> bool:
    return path.is_dir() and any(path.glob(pattern))


def _require_one_kind(path: Path) -> None:
    """Raise SourceError for a folder of both kinds of tables: one of them would silently not be trained."""
    if _holds(path, "*.parquet") and _holds(path, "*.jsonl"):
        raise SourceError(f"{path} holds *.parquet and *.jsonl files; put them into folders of their own, and open one")


def _require_texts(path: Path) -> None:
    """Raise SourceError for a folder of texts with tables further down, whose syntax would be trained as text."""
    tables = sorted(file for kind in ("jsonl", "parquet") for file in path.glob(f"**/*.{kind}"))
    if tables:
        raise SourceError(
            f"{path} would be read as a folder of texts, and {tables[0]} is a table: open {tables[0].parent}, or make "
            "a TextFolder with a pattern"
        )


def _of_rows(data: Any, split: str) -> Dataset:
    """Return what is in memory as a table; raises SourceError, with what to do, when it is none."""
    import datasets

    if isinstance(data, datasets.DatasetDict):
        return _split_of(data, split)
    if isinstance(data, datasets.Dataset):
        return data
    what = type(data).__name__
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise SourceError(f"{what} has no rows by number; train it with StreamLoader")
    raise SourceError(f"{what} is no data set; give a path, a name on the Hub, or a datasets.Dataset (from_list, say)")


def _split_of(data: DatasetDict, split: str) -> Dataset:
    if split not in data:
        raise SourceError(f"the data has the splits {', '.join(map(str, data))} and not {split!r}; name one of them")
    return data[split]


def _load(path: Path, name: str, split: str) -> Dataset:
    import datasets
    from datasets import config as settings

    why, offline = None, settings.HF_HUB_OFFLINE
    if not path.is_dir():
        if not is_name(name):
            raise SourceError(f"{name!r} is neither a file nor a folder here, nor a name on the Hub (owner/name)")
        why = unreachable(name, "dataset")
    try:
        settings.HF_HUB_OFFLINE = offline or why is not None  # else it asks again and again before the cache
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, split=split)
    except Exception as error:  # the Hub, the network and data sets' own code raise anything
        raise SourceError(
            f"{name!r} is neither a file nor a folder here, nor a data set that can be loaded with split {split!r}: "
            f"{why or f'{type(error).__name__}: {error}'}"
        ) from error
    finally:
        settings.HF_HUB_OFFLINE = offline
    if isinstance(loaded, datasets.DatasetDict):
        return _split_of(loaded, split)
    assert isinstance(loaded, datasets.Dataset)
    return loaded
