"""Which texts a recipe names, before anything is tokenized; what is left out is said."""

from __future__ import annotations

import glob
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chunkflow.matching import matching
from launch.config import DataConfig
from launch.errors import DataError

STDLIB = "stdlib"


@dataclass(frozen=True, slots=True)
class FolderChoice:
    """Files of a folder, by what is excluded."""

    root: Path
    names: tuple[str, ...]
    """Files taken, relative to the root."""
    exclude: tuple[str, ...]
    """Patterns that leave exactly these: the recipe's, and the names of files that are too large."""
    note: str | None
    """What the size limit left out, in words."""

    def texts(self) -> Iterator[str]:
        """Yield the files' texts, for a vocabulary; the source is the one to complain of bad bytes."""
        for name in self.names:
            yield (self.root / name).read_text(encoding="utf-8", errors="replace")


def choose_files(data: DataConfig) -> FolderChoice:
    """Return the files that a recipe takes. Raises DataError when a file of long_files is not among them."""
    root = Path(sysconfig.get_path("stdlib")) if data.path == STDLIB else Path(data.path)
    if not root.is_dir():
        raise DataError(f"data.path {data.path} is no folder; give one with text files, or {STDLIB!r}")
    try:
        found = matching(root, data.pattern, data.exclude)
    except (ValueError, NotImplementedError) as error:  # an absolute or empty pattern, or one that leads out
        raise DataError(f"data.pattern is {data.pattern!r}, no glob relative to {root}: {error}") from error
    sizes = {name: path.stat().st_size for name, path in found.items() if path.is_file()}
    lost = [name for name in data.long_files if name not in sizes]
    if lost:
        raise DataError(
            f"data.long_files names {lost}, not among the {len(sizes)} files of {root} that match {data.pattern!r}; "
            "give paths relative to that folder, or --data.long_files '[]' for none"
        )
    limit = data.max_file_bytes
    large = [name for name, size in sizes.items() if limit is not None and size > limit and name not in data.long_files]
    return FolderChoice(
        root=root,
        names=tuple(name for name in sizes if name not in set(large)),
        exclude=(*data.exclude, *map(glob.escape, large)),
        note=_note(sizes, large, data) if large else None,
    )


def _note(sizes: dict[str, int], large: list[str], data: DataConfig) -> str:
    lost, total = sum(sizes[name] for name in large), sum(sizes.values())
    return (
        f"{len(large)} of {len(sizes)} files left out, larger than data.max_file_bytes = {data.max_file_bytes} and not "
        f"in data.long_files: {lost / 1e6:.1f} of {total / 1e6:.1f} MB. What is taken is whole."
    )


def jsonl_texts(path: Path, field: str) -> Iterator[str]:
    """Yield the texts of a JSONL file, or of those of a folder, for a vocabulary.

    Skips what is no text: the source complains, with the line.
    """
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        yield from _texts_of(file, field)


def _texts_of(path: Path, field: str) -> Iterator[str]:
    try:
        lines = path.open("rb")
    except OSError:
        return
    with lines:
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            text = value.get(field) if isinstance(value, dict) else None
            if isinstance(text, str):
                yield text.encode("utf-8", "replace").decode()
