"""The code of README and docs, block by block, and what runs each: the words of `test_docs`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.spawn import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    kind: str
    """python, console, diff, or nothing."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Run:
    """What runs some blocks of a page, in order: those in which one of `has` is found."""

    page: str
    has: tuple[str, ...]
    run: Callable[[Path, list[str]], None]
    """Is given an empty folder and the texts of the blocks."""
    slow: bool = False
    timeout_s: int = 180

    def blocks(self) -> list[Block]:
        """The blocks meant; exactly one each."""
        found = []
        for words in self.has:
            here = [block for block in blocks(self.page) if words in block.text]
            assert len(here) == 1, f"{self.page} has {len(here)} blocks with {words!r}, and one was meant"
            found += here
        return found

    def __str__(self) -> str:
        return f"{self.page}-{self.has[0][:24]}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text()
    assert text.count("\n```") == 2 * len(_FENCE.findall(text)), f"{page} has a fence that is not closed"
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _FENCE.finditer(text)]


def after(diff: str) -> str:
    """What a diff leaves behind."""
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))


def commands(console: str) -> list[tuple[str, str]]:
    """The commands of a console block, continued lines joined, each with the output that is shown below it."""
    joined = re.sub(r"\\\n\s+", "", console)
    found = []
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        found.append((re.split(r"\s+# ", command)[0].strip(), output))
    return found


def execute(page: str, code: str, names: dict) -> dict:
    """Run python code with these names known; return all names."""
    exec(compile(code, page, "exec"), names)
    return names
