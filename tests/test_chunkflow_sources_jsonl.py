"""JSON lines as a source: texts and tokens, and every bad line named."""

import json

import pytest
from typer.testing import CliRunner

from chunkflow.cli import app
from chunkflow.errors import SourceError
from chunkflow.index import check_length
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_open import open_source
from tests.source_files import json_lines
from tests.tokenizers_fixture import tiny_tokenizer


def test_lines_of_text_and_of_tokens(tmp_path):
    lines = [
        {"text": "the lazy dog"},
        {"input_ids": [5, 6, 7], "text": "kept as it is"},
        "",
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 299]},
        {"input_ids": [5], "labels": None},
        {"input_ids": [1, 2, 3], "labels": [3, -100, -100]},
        {"text": "fox"},
    ]
    source = json_lines(tmp_path, lines, tiny_tokenizer())
    assert source.lengths.tolist() == [len(tiny_tokenizer()("the lazy dog")["input_ids"]) + 1, 3, 4, source.lengths[3]]
    assert source.read(1).shift_labels.tolist() == [6, 7, -100]
    labelled = source.read(2)
    assert labelled.shift_labels.tolist() == [-100, 7, 299, -100]
    assert labelled.loss_weights.tolist() == [0, 1, 1, 0]
    assert source.weights[2] == 2
    assert tiny_tokenizer().decode(source.read(3).input_ids) == "fox<eos>"
    assert source.max_token_id == 299
    path = tmp_path / "x.jsonl"
    assert {s.reason: (s.count, s.examples) for s in source.skipped} == {
        "blank line": (1, (f"{path}:3",)),
        "fewer than 2 tokens, so nothing to predict": (1, (f"{path}:5",)),
        "no label is a target": (1, (f"{path}:6",)),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"x\.jsonl:2: not JSON"),
        ('{"text": "x", "deep": ' + "[" * 100_000, r"x\.jsonl:2: not JSON \(maximum recursion depth"),
        ("[1, 2]", r"x\.jsonl:2: a list; each line must be one JSON object"),
        ({"body": "x"}, r"x\.jsonl:2: neither 'text' nor 'input_ids', .* among its fields \['body'\]; set field="),
        ({"text": 3}, r"x\.jsonl:2: 'text' is a int; it must be a string"),
        ('{"text": "\\ud800"}', r"x\.jsonl:2: 'text' is no valid Unicode"),
        ({"input_ids": "12"}, r"x\.jsonl:2: 'input_ids' is a str; it must be a list of whole numbers"),
        ({"input_ids": [1, None]}, r"x\.jsonl:2: 'input_ids' holds None"),
        ({"input_ids": [1, True]}, r"x\.jsonl:2: 'input_ids' holds True"),
        ({"input_ids": [1, 2.0]}, r"x\.jsonl:2: 'input_ids' holds 2\.0"),
        ({"input_ids": [1, -1]}, r"x\.jsonl:2: token ids go from -1 to 1; they must be 0 to"),
        ({"input_ids": [1, -100]}, r"x\.jsonl:2: token ids go from -100 to 1"),
        ({"input_ids": [1, 2**31]}, r"x\.jsonl:2: token ids go from 1 to 2147483648"),
        ({"input_ids": [1, 2**70]}, r"x\.jsonl:2: 'input_ids' holds a number beyond 64 bits"),
        ({"input_ids": [1, 2], "labels": [1]}, r"x\.jsonl:2: 1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [1, -5]}, r"x\.jsonl:2: token ids go from -5 to 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(SourceError, match=message):
        json_lines(tmp_path, [{"text": "fine"}, line], tiny_tokenizer())
    assert not list((tmp_path / "cache").glob("*/index.json"))


def test_text_without_a_tokenizer_and_no_file(tmp_path):
    with pytest.raises(SourceError, match=r"x\.jsonl:1: a text, and no tokenizer was given"):
        json_lines(tmp_path, [{"text": "x"}])
    with pytest.raises(SourceError, match=r"absent\.jsonl cannot be read"):
        JsonLines(tmp_path / "absent.jsonl", None, cache_dir=tmp_path)


def test_an_empty_data_set_says_what_was_left_out(tmp_path):
    with pytest.raises(SourceError, match=r"no sample to train on; 2 left out, fewer than 2 tokens.*x\.jsonl:1, "):
        json_lines(tmp_path, [{"input_ids": [1]}, {"input_ids": []}])


def test_a_sample_too_long_for_int32():
    check_length("a", 2**31 - 1)
    with pytest.raises(SourceError, match="big has 2147483648 tokens"):
        check_length("big", 2**31)


def test_a_folder_of_files_is_their_lines_in_order(tmp_path):
    for name, ids in (("b", [4, 5]), ("a", [1, 2, 3])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    seen = []
    options = {"cache_dir": tmp_path / "cache", "progress": lambda done, total: seen.append((done, total))}
    source = open_source(tmp_path, None, **options)
    assert [source.read(n).input_ids.tolist() for n in range(len(source))] == [[1, 2, 3], [4, 5]]
    total = sum(file.stat().st_size for file in tmp_path.glob("*.jsonl"))
    assert seen[-1] == (total, total)
    (tmp_path / "b.jsonl").write_text("no\n")
    with pytest.raises(SourceError, match=r"b\.jsonl:1: not JSON"):
        open_source(tmp_path, None, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty is a folder without \*\.jsonl files"):
        JsonLines(tmp_path / "empty", None, cache_dir=tmp_path)


def test_a_loop_finds_what_the_command_has_tokenized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    assert CliRunner().invoke(app, ["plan", "a.jsonl"]).exit_code == 0
    (store,) = (tmp_path / "runs" / "cache").glob("*/")
    assert store.name == open_source("a.jsonl", None).manifest
    assert [*(tmp_path / "runs" / "cache").glob("*/")] == [store]


class Stumbling:
    """A tokenizer that fails on one text; the rest is the real one's."""

    def __init__(self, error):
        self._real, self._error = tiny_tokenizer(), error

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __call__(self, texts, **options):
        if "trap" in texts:
            raise self._error
        return self._real(texts, **options)


class Panic(BaseException):
    """As Rust code raises one in Python."""


@pytest.mark.parametrize("error", [ValueError("no such piece"), Panic("no such piece")], ids=["error", "panic"])
def test_a_text_on_which_the_tokenizer_fails_is_named(tmp_path, error):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("fox", "dog", "trap", "fox")))
    with pytest.raises(SourceError, match=r"x\.jsonl:3: the tokenizer failed: \w+: no such piece"):
        JsonLines(path, Stumbling(error), cache_dir=tmp_path / "cache")
    path.write_text(json.dumps({"prompt": "fox", "completion": "trap"}) + "\n")
    with pytest.raises(SourceError, match=r"x\.jsonl:1: the tokenizer failed"):
        JsonLines(path, Stumbling(error), cache_dir=tmp_path / "cache")


def test_another_field(tmp_path):
    source = json_lines(tmp_path, [{"body": "fox"}], tiny_tokenizer(), field="body")
    assert source.description["field"] == "body"


def test_a_message_that_is_no_unicode_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud800"}]
    with pytest.raises(SourceError, match=r"x\.jsonl:1: the tokenizer failed: "):
        json_lines(tmp_path, [{"messages": messages}], tokenizer)
