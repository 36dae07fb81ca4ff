"""Files of a folder by a pattern. What is excluded as a whole is not looked into: it may hold many times as much."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath


def matching(root: Path, pattern: str, exclude: Sequence[str]) -> dict[str, Path]:
    """Return what matches a glob relative to `root`, folders too, by its path from there, with `/`, sorted.

    What matches one of `exclude` is left out; there `*` crosses folders (`fnmatch`). Raises ValueError or
    NotImplementedError, mostly pathlib's, for a pattern that is no relative glob, or leads out of the folder.
    """
    first, *rest = PurePosixPath(pattern).parts or ("",)
    if first == "**" and rest and not pattern.endswith("/") and not any("**" in part for part in rest):
        matches = (path for folder in _folders(root, exclude) for path in folder.glob("/".join(rest)))
    else:
        matches = root.glob(pattern)
    found = {path.relative_to(root).as_posix(): path for path in matches}
    outside = next((name for name in found if PurePosixPath(os.path.normpath(name)).parts[:1] == ("..",)), None)
    if outside is not None:
        raise ValueError(f"it leads out of the folder, to {outside}; give a folder further up")
    return {name: found[name] for name in sorted(found) if not any(fnmatchcase(name, glob) for glob in exclude)}


def _folders(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Yield a folder and those below it, through no link, as pathlib's `**` does; those left out whole are not."""
    whole = [glob for glob in exclude if glob.endswith("*")]  # matches a folder's path and `/`: all that begins so, too
    for place, inner, _ in os.walk(root):
        folder = Path(place)
        yield folder
        above = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        inner[:] = [name for name in inner if not any(fnmatchcase(f"{above}{name}/", glob) for glob in whole)]
