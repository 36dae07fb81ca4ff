"""Every command and code block of README and docs is run, as it stands there. What is not, and why: `NOT_RUN`.

The blocks are found in the pages, and run by what `tests/docs_*.py` list for them. A block that nothing runs fails
here, and so does a runner whose block is gone.
"""

import contextlib
import re
from importlib.util import find_spec

import pytest

import checkpointing.cli
import chunkflow.cli
import moe.cli
import pipeline.cli
from tests import docs_checkpointing, docs_chunkflow, docs_from, docs_launch, docs_moe, docs_pipeline
from tests.docs_blocks import PAGES, Run, blocks, commands
from tests.docs_launch import NOT_RUN
from tests.spawn import ROOT

RUNS: list[Run] = [
    run
    for module in (docs_launch, docs_chunkflow, docs_checkpointing, docs_pipeline, docs_moe, docs_from)
    for run in module.RUNS
]

APPS = {
    "checkpointing": checkpointing.cli.app, "chunkflow": chunkflow.cli.app, "moe": moe.cli.app,
    "pipeline": pipeline.cli.app,
}  # fmt: skip

SHOWN = {
    "checkpoints/   what a resume reads": "the files of a run",
    "298 of 601 files left out": "what the quickstart printed once; its numbers depend on the version of Python",
    "chunkflow/        long-tailed sequences": "the folders of the project",
}
"""Blocks that are no code, by words in them, and what they are."""


def marked(run):
    marks = [pytest.mark.timeout(run.timeout_s), *([pytest.mark.slow] if run.slow else [])]
    return pytest.param(run, id=str(run), marks=marks)


def test_every_block_is_run():
    found = [block for page in PAGES for block in blocks(page)]
    runs = [block for run in RUNS for block in run.blocks()]
    assert len(runs) == len(set(runs)), "a block is run twice"
    shown = {block for words in SHOWN for block in found if words in block.text}
    assert len(shown) == len(SHOWN)
    left = [str(block) for block in found if block not in runs and block not in shown]
    assert not left, f"nothing runs {left}: list what does in tests/docs_*.py"


def test_code_is_in_fences():
    """Else nobody would find it: an indented block that begins as a command or as code."""
    words = r"\$ |python |torchrun |checkpoint |chunkflow |make |from [\w.]+ import |import |\w+ = "
    code = re.compile(rf"^\n    ({words})", re.MULTILINE)
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not code.search(text), f"{page}: {code.search(text)[0]!r}"


def test_what_is_not_run_is_there():
    said = {command for page in PAGES for block in blocks(page) if block.kind == "console"
            for command, _ in commands(block.text)}  # fmt: skip
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in said), beginning


DATED = ("docs/benchmarks.md", "docs/log.md")
"""Pages whose commands are those of their day."""


def exists(command):
    """Whether what a command names is there: a module that can be run, a verb, a target of make."""
    first, *rest = command.split()
    if first == "make":
        wanted = next(word for word in rest if "=" not in word)
        return re.search(rf"^{re.escape(wanted)}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
    if first == "torchrun":
        return "-m" not in rest or find_spec(rest[rest.index("-m") + 1]) is not None
    module = rest[1] if first == "python" else {"checkpoint": "checkpointing"}.get(first, first)
    found = find_spec(module)
    if found is not None and found.submodule_search_locations is not None:
        found = find_spec(f"{module}.__main__")
    verb = next((word for word in (rest[2:] if first == "python" else rest) if word.isalpha() and word.islower()), None)
    if found is None or verb is None or module not in APPS:
        return found is not None
    app = APPS[module]
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
    return verb in [*verbs, *(group.name for group in app.registered_groups)]


def test_commands_in_the_text_exist():
    for page in set(PAGES) - set(DATED):
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`((?:python -m|torchrun|checkpoint|chunkflow|make) [^`\n]+)`", text):
            assert exists(command), f"{page}: `{command}`"


@pytest.mark.parametrize("run", [marked(run) for run in RUNS])
def test_block(run, tmp_path):
    with contextlib.chdir(tmp_path):
        run.run(tmp_path, [block.text for block in run.blocks()])
