"""Functions and classes as samples: which, in which words, and that nothing held out is trained."""

import json
from dataclasses import replace

import pytest

from launch.config import DataConfig, FinetuneConfig, ModelConfig
from launch.corpus import choose_files
from launch.data import load_data
from launch.errors import DataError
from launch.functions import definitions, split_by_top_level, write_functions
from tests.tiny_chat import write_chat_model

CODE = '''
import os


@decorated(
    1,
)
def plain(x):
    def inner():
        """Nested."""
        return x

    return inner


class Thing:
    """A thing."""

    if os.name:

        async def method(self):
            """Do it.

            Twice.
            """
            return "ü"
'''


def corpus(tmp_path, **files):
    root = tmp_path / "corpus"
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        (root / f"{name}.py").write_text(text)
    return root


def write(tmp_path, root, *, max_bytes=None, held_out=0, seed=0):
    choice = choose_files(DataConfig(kind="functions", path=str(root), max_file_bytes=None, long_files=()))
    return write_functions(choice, max_bytes=max_bytes, held_out=held_out, seed=seed, cache=tmp_path / "cache")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def many(count):
    return {f"file{n:03}": f"class C{n}:\n    def f(self):\n        return {n}\n\n    def g(self):\n        {n}\n"
            for n in range(count)}  # fmt: skip


def test_every_definition_is_a_sample_nested_ones_too():
    found = list(definitions("a/b.py", CODE))
    assert [(d.kind, ".".join(d.path)) for d in found] == [
        ("function", "plain"), ("function", "plain.inner"), ("class", "Thing"), ("function", "Thing.method"),
    ]  # fmt: skip
    plain, inner, thing, method = found
    assert plain.source.startswith("@decorated(\n    1,\n)\ndef plain(x):\n    def inner():")
    assert plain.source.endswith("    return inner\n")
    assert inner.source == 'def inner():\n    """Nested."""\n    return x\n'
    assert method.source.startswith("async def method(self):\n")
    assert method.source in "\n".join(line.removeprefix("        ") for line in thing.source.split("\n"))
    assert list(definitions("c.py", "class A:\n    def f(self): pass\n"))[1].kind == "method"


def test_a_docstring_makes_a_chat_of_it():
    plain, inner, _, method = (d.record() for d in definitions("a/__init__.py", CODE))
    assert plain.keys() == {"text"}
    asked, answered = method["messages"]
    assert asked == {
        "role": "user",
        "content": "Write the Python function `Thing.method` of the module `a`:\n\nDo it.\n\nTwice.",
    }
    assert answered["role"] == "assistant"
    assert answered["content"].startswith('async def method(self):\n    """Do it.')
    assert inner["messages"][1]["content"].startswith("def inner")


def test_files_are_made_once_and_always_the_same(tmp_path):
    root = corpus(tmp_path, **many(20))
    files = write(tmp_path, root, held_out=5)
    before = [path.stat().st_mtime_ns for path in (files.train, files.held_out)]
    content = files.train.read_bytes()
    assert write(tmp_path, root, held_out=5) == files
    assert [path.stat().st_mtime_ns for path in (files.train, files.held_out)] == before
    files.train.write_bytes(content[:100])  # damaged: made again
    assert write(tmp_path, root, held_out=5).train.read_bytes() == content
    assert write(tmp_path, root, held_out=5, seed=1).held_out.read_bytes() != files.held_out.read_bytes()
    assert write(tmp_path, root, held_out=6).held_out.parent != files.held_out.parent
    (root / "file000.py").write_text("def changed(): pass\n")
    assert write(tmp_path, root, held_out=5).train != files.train


def test_no_line_of_what_is_held_out_is_trained(tmp_path):
    files = write(tmp_path, corpus(tmp_path, **many(40)), held_out=10)
    train, held = records(files.train), records(files.held_out)
    assert len(held) == 10
    assert len(train) == 3 * (40 - 4)  # four whole classes, of which two samples are in neither
    trained = "".join(record["text"] for record in train)
    for record in held:
        for line in record["text"].splitlines():
            assert any(char.isdigit() for char in line) is False or line.strip() not in trained.split("\n")


def test_what_is_left_out_is_said(tmp_path):
    same = "def same():\n    return 1\n"
    root = corpus(
        tmp_path, a=same + "class Big:\n    x = '" + "y" * 200 + "'\n\n    def f(self): pass\n", b=same,
        c="def broken(:\n", d="x = '\0'\n",
    )  # fmt: skip
    files = write(tmp_path, root, max_bytes=100)
    assert [record["text"] for record in records(files.train)] == [same, "def f(self): pass\n"]
    assert [note.split(",")[0] for note in files.notes] == [
        "1 functions and classes left out", "1 functions and classes left out", "2 files left out",
    ]  # fmt: skip
    assert "larger than data.max_file_bytes = 100" in files.notes[0]
    assert "c.py, d.py" in files.notes[2]
    assert write(tmp_path, root, max_bytes=100).notes == files.notes


@pytest.mark.parametrize("held_out", [6, 7, 100])
def test_too_many_held_out(tmp_path, held_out):
    with pytest.raises(DataError, match=rf"data.held_out is {held_out}, and there are 6 functions and classes in 2"):
        write(tmp_path, corpus(tmp_path, **many(2)), held_out=held_out)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_nothing_held_out():
    found = list(definitions("a.py", CODE))
    assert split_by_top_level(found, count=0, seed=0) == (found, [])


@pytest.fixture
def model_folder(tmp_path):
    return write_chat_model(tmp_path / "model")


def test_only_the_answer_is_a_target(tmp_path, model_folder):
    data = DataConfig(kind="functions", path=str(corpus(tmp_path, a=CODE)), held_out=0, cache=str(tmp_path / "cache"))
    config = replace(FinetuneConfig(), data=data, model=ModelConfig(path=str(model_folder)))
    loaded = load_data(config)
    assert loaded.held_out is None
    samples = [loaded.train.read(number) for number in range(len(loaded.train))]
    assert len(samples) == 4
    targets = [loaded.tokenizer.decode(s.shift_labels[s.shift_labels >= 0]) for s in samples]
    answers = {d.path[-1]: d.source for d in definitions("a.py", CODE)}
    for target, name in zip(targets[1:], ("inner", "Thing", "method"), strict=True):
        assert target.startswith(answers[name])
        assert "Write the Python" not in target
    assert targets[0].startswith("decorated")  # a text: all but its first token


def test_functions_need_a_model_with_a_chat_template(tmp_path):
    data = DataConfig(kind="functions", path=str(corpus(tmp_path, a=CODE)), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"data.kind functions asks .* in chats.* set model.path to a model"):
        load_data(replace(FinetuneConfig(), data=data))


def test_no_python_file_at_all(tmp_path, model_folder):
    (tmp_path / "empty").mkdir()
    data = DataConfig(kind="functions", path=str(tmp_path / "empty"), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"no file of .*empty matches data.pattern '\*\*/\*.py'"):
        load_data(replace(FinetuneConfig(), data=data, model=ModelConfig(path=str(model_folder))))
