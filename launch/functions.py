"""The functions and classes of Python files as samples: where there is a docstring, a chat that asks for them.

Nested definitions are samples too, as well as part of what they stand in. So what is held out is held out with
everything that stands on the same top level: no line of it is trained.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from launch.corpus import FolderChoice
from launch.errors import DataError

_VERSION = 1
_TRAIN, _HELD_OUT, _DONE = "train.jsonl", "held_out.jsonl", "made.json"
_KINDS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Definition:
    """One function or class, decorators included."""

    file: str
    """Relative to the folder."""
    path: tuple[str, ...]
    """Its name, behind the names of what it stands in."""
    kind: str
    """class, function or method."""
    source: str
    """Its lines, without the indentation they share."""
    docstring: str | None

    def record(self) -> dict[str, object]:
        """Return it as one line of a data file."""
        if not self.docstring:
            return {"text": self.source}
        module = self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        asked = f"Write the Python {self.kind} `{'.'.join(self.path)}` of the module `{module}`:\n\n{self.docstring}"
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": self.source}]}


@dataclass(frozen=True, slots=True)
class FunctionFiles:
    """Samples of Python files, on disk."""

    train: Path
    held_out: Path
    notes: tuple[str, ...]
    """What was left out, in words."""


def definitions(file: str, text: str) -> Iterator[Definition]:
    """Yield the functions and classes of one file, outer ones first. Raises SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old escape in somebody's string
        tree = ast.parse(text)
    yield from _inside(tree, (), file, text.splitlines(keepends=True))


def _inside(node: ast.AST, path: tuple[str, ...], file: str, lines: list[str]) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _KINDS):
            yield from _inside(child, path, file, lines)
            continue
        inner = (*path, child.name)
        first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
        source = textwrap.dedent("".join(lines[first - 1 : child.end_lineno]))
        kind = (
            "class" if isinstance(child, ast.ClassDef) else "method" if isinstance(node, ast.ClassDef) else "function"
        )
        yield Definition(file, inner, kind, source, ast.get_docstring(child))
        yield from _inside(child, inner, file, lines)


def write_functions(
    choice: FolderChoice, *, max_bytes: int | None, held_out: int, seed: int, cache: Path
) -> FunctionFiles:
    """Write the samples of these files under `cache`, unless they are there; deterministic, whole or not at all.

    Definitions of more than `max_bytes` are left out, and counted in the notes; so is the second of two that are alike.
    Of `held_out` samples, drawn by the seed, the top-level definition is not trained. Raises DataError when nothing
    would be left to train on.
    """
    texts = list(zip(choice.names, choice.texts(), strict=True))
    digest = xxhash.xxh3_128(json.dumps([_VERSION, max_bytes, held_out, seed]).encode())
    for name, text in texts:
        digest.update(json.dumps([name, text]).encode())
    folder = cache / "functions" / digest.hexdigest()
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        taken, notes = _take(texts, max_bytes)
        train, held = split_by_top_level(taken, count=held_out, seed=seed)
        _publish(folder, {_TRAIN: train, _HELD_OUT: held}, notes)
    notes = json.loads((folder / _DONE).read_text(encoding="utf-8"))["notes"]
    return FunctionFiles(folder / _TRAIN, folder / _HELD_OUT, tuple(notes))


def _take(texts: Sequence[tuple[str, str]], max_bytes: int | None) -> tuple[list[Definition], list[str]]:
    """Return the definitions that are taken, and in words what is not."""
    taken: dict[str, Definition] = {}
    broken, large, alike = [], [], 0
    for name, text in texts:
        try:
            found = list(definitions(name, text))
        except (SyntaxError, ValueError):  # ValueError: a null byte
            broken.append(name)
            continue
        for definition in found:
            size = len(definition.source.encode("utf-8", "replace"))
            if max_bytes is not None and size > max_bytes:
                large.append(size)
            elif definition.source in taken:
                alike += 1
            else:
                taken[definition.source] = definition
    notes = []
    if large:
        notes.append(f"{len(large)} functions and classes left out, larger than data.max_file_bytes = {max_bytes}: "
                     f"{sum(large) / 1e6:.1f} MB. What stands in them is taken.")  # fmt: skip
    if alike:
        notes.append(f"{alike} functions and classes left out, like another one to the letter")
    if broken:
        notes.append(f"{len(broken)} files left out, no Python that {_python()} reads: {', '.join(broken[:3])}")
    return list(taken.values()), notes


def _python() -> str:
    return f"Python {sys.version_info.major}.{sys.version_info.minor}"


def split_by_top_level(
    taken: Sequence[Definition], *, count: int, seed: int
) -> tuple[list[Definition], list[Definition]]:
    """Return (training, held-out) definitions: `count` held out, no line of which is in the others."""
    groups: dict[tuple[str, str], list[Definition]] = {}
    for definition in taken:
        groups.setdefault((definition.file, definition.path[0]), []).append(definition)
    keys, held, gone = list(groups), [], set()
    for number in np.random.default_rng(seed).permutation(len(keys)).tolist():
        if len(held) >= count:
            break
        gone.add(keys[number])
        held += groups[keys[number]]
    train = [definition for definition in taken if (definition.file, definition.path[0]) not in gone]
    if not train or len(held) < count:
        raise DataError(
            f"data.held_out is {count}, and there are {len(taken)} functions and classes in {len(groups)} top-level "
            "ones, which are held out whole; hold out fewer"
        )
    return train, held[:count]


def _is_whole(folder: Path) -> bool:
    try:
        made = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        return all(_digest(folder / name) == made["files"][name] for name in (_TRAIN, _HELD_OUT))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _publish(folder: Path, files: dict[str, list[Definition]], notes: list[str]) -> None:
    """Put the files in their place at once; another process may have been faster, with the same ones."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder.parent))
    try:
        for name, some in files.items():
            with (partial / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(definition.record()) + "\n" for definition in some)
        made = {"files": {name: _digest(partial / name) for name in files}, "notes": notes}
        (partial / _DONE).write_text(json.dumps(made), encoding="utf-8")
        partial.replace(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
