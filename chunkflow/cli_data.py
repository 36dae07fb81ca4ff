"""What the commands of `chunkflow.cli` read: a data set, or lengths alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress

from chunkflow.errors import NoTokenizerError, SourceError

if TYPE_CHECKING:
    from chunkflow.index import StoredSource
    from chunkflow.layout import Ints


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error output, if it is one."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def open_data(data: str | None, tokenizer: str | None, cache: Path, split: str, field: str) -> StoredSource:
    """Open a command's DATA; raises SourceError, or what else chunkflow raises on purpose."""
    from chunkflow.sources_open import open_source

    if data is None:
        raise SourceError("no data was named; give DATA, or --lengths where only lengths are needed")
    loaded = None if tokenizer is None else _tokenizer(tokenizer)
    try:
        with progress_bar("tokens") as progress:
            source = open_source(data, loaded, cache_dir=cache, split=split, field=field, progress=progress)
    except NoTokenizerError as error:
        raise NoTokenizerError(f"{error} (--tokenizer names a folder, or a model on the Hub)") from error
    for one in source.skipped:
        typer.echo(f"{data}: {one}", err=True)
    return source


def read_lengths(
    lengths: Path | None, data: str | None, tokenizer: str | None, cache: Path, split: str, field: str
) -> Ints:
    """Return int64 [N], N > 0, checked."""
    import numpy as np

    from chunkflow.plan_input import check_lengths

    if lengths is None:
        found = np.asarray(open_data(data, tokenizer, cache, split, field).lengths)
    else:
        if data is not None:
            raise SourceError(f"both {data} and --lengths were given; give one")
        try:
            found = np.load(lengths)
        except Exception as error:  # a damaged file makes numpy raise anything
            raise SourceError(f"{lengths} cannot be read as lengths: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        raise SourceError(f"{lengths}: lengths are a flat array of at least one whole number")
    if found.dtype == np.uint64 and int(found.max()) > 2**63 - 1:
        raise SourceError(f"{lengths} holds {found.max()}; at most 2147483647 can be counted")
    checked = found.astype(np.int64)
    check_lengths(checked)
    return checked


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from chunkflow.hub import is_name, unreachable

    why = unreachable(name, "model") if not Path(name).exists() and is_name(name) else None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=why is not None)
    except Exception as error:  # the Hub, damaged files and tokenizers' own code raise anything
        raise SourceError(f"no tokenizer could be loaded from {name!r}: {why or error}") from error
