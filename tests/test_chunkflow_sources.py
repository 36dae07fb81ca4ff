"""Folders and JSON lines as sources: whole samples, shifted once, identified by content, cached safely."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chunkflow.cache import open_or_build
from chunkflow.errors import SourceError
from chunkflow.index import StoredSource, check_length
from chunkflow.sources import Sample, Source, fetch, manifest_of
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_memory import MemorySource
from chunkflow.sources_text import TextFolder
from tests.spawn import run_ranks
from tests.tokenizers_fixture import tiny_tokenizer

TEXTS = {
    "b.txt": "the lazy dog",
    "a/long.py": "def chunk(tokens):\n    return tokens\n" * 200,
    "a/unicode.txt": "grüße, 東京\r\n",
}


def write_folder(root: Path, texts=TEXTS):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def write_lines(path: Path, lines):
    path.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def text_folder(tmp_path, **options) -> TextFolder:
    options = {"cache_dir": tmp_path / "cache", **options}
    return TextFolder(write_folder(tmp_path / "data"), tiny_tokenizer(), **options)


def json_lines(tmp_path, lines, tokenizer=None, **options) -> JsonLines:
    return JsonLines(write_lines(tmp_path / "x.jsonl", lines), tokenizer, cache_dir=tmp_path / "cache", **options)


def test_each_file_is_one_whole_sample_ended_by_eos(tmp_path):
    source: Source = text_folder(tmp_path)
    tokenizer = tiny_tokenizer()
    assert len(source) == 3
    for index, name in enumerate(["a/long.py", "a/unicode.txt", "b.txt"]):
        sample = source.read(index)
        expected = [*tokenizer.backend_tokenizer.encode(TEXTS[name]).ids, tokenizer.eos_token_id]
        assert sample.input_ids.tolist() == expected
        assert sample.shift_labels.tolist() == [*expected[1:], -100]
        assert sample.loss_weights.tolist() == [1.0] * (len(expected) - 1) + [0.0]
        assert (sample.input_ids.dtype, sample.shift_labels.dtype) == (np.int64, np.int64)
        assert sample.loss_weights.dtype == np.float32
        assert tokenizer.decode(sample.input_ids[:-1]) == TEXTS[name]
    assert source.lengths.dtype == np.int64
    assert source.lengths.tolist() == [len(source.read(i).input_ids) for i in range(3)]
    assert source.weights.dtype == np.float64
    assert source.weights.tolist() == (source.lengths - 1).tolist()
    ids = np.concatenate([source.read(i).input_ids for i in range(3)])
    assert (source.min_token_id, source.max_token_id) == (ids.min(), ids.max())


def test_many_files_go_through_in_batches_and_in_order(tmp_path):
    texts = {f"{i:04}.txt": f"sample {i}" for i in range(600)}
    source = TextFolder(write_folder(tmp_path / "data", texts), tiny_tokenizer(), cache_dir=tmp_path / "cache")
    assert len(source) == 600
    for i in (0, 255, 256, 257, 599):
        assert tiny_tokenizer().decode(source.read(i).input_ids) == f"sample {i}<eos>"


def test_pattern_and_exclude(tmp_path):
    assert len(text_folder(tmp_path, pattern="**/*.py")) == 1
    assert len(text_folder(tmp_path, exclude=["a/*"])) == 1
    assert len(text_folder(tmp_path, exclude=("*.py", "b.*"))) == 1
    with pytest.raises(SourceError, match=r"no file of .*data matches '\*\.md'"):
        text_folder(tmp_path, pattern="*.md")


def test_a_cache_inside_the_folder_is_not_data(tmp_path):
    inside = tmp_path / "data" / "cache"
    first = text_folder(tmp_path, cache_dir=inside)
    assert text_folder(tmp_path, cache_dir=inside).manifest == first.manifest
    assert len(first) == 3


def test_short_samples_are_left_out_and_counted(tmp_path):
    write_folder(tmp_path / "data", {f"empty{i}": "" for i in range(7)})
    source = text_folder(tmp_path)
    (skipped,) = source.skipped
    assert (len(source), skipped.count, skipped.examples[0]) == (3, 7, "empty0")
    assert str(skipped).startswith("7 left out, fewer than 2 tokens, so nothing to predict: empty0, ")
    assert text_folder(tmp_path).skipped == source.skipped


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(SourceError, match=r"image\.png is not UTF-8 text .*at byte 0\); convert it, or exclude it"):
        text_folder(tmp_path)
    assert list((tmp_path / "cache").glob("[!.]*[!k]")) == []


def test_a_file_whose_name_is_not_text(tmp_path):
    write_folder(tmp_path / "data", {os.fsdecode(b"\xff.txt"): "the lazy dog", os.fsdecode(b"\xfe.txt"): ""})
    source = text_folder(tmp_path)
    assert len(source) == 1 + len(TEXTS)
    assert source.skipped[0].examples == ("\udcfe.txt",)


def test_a_pattern_that_is_none(tmp_path):
    for pattern in ("", "/etc/passwd"):
        with pytest.raises(SourceError, match=f"the pattern '{pattern}' is not a glob relative to .*data"):
            text_folder(tmp_path, pattern=pattern)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for cache in ("file", "file/below"):
        with pytest.raises(SourceError, match=f"cannot be written under .*{cache}: .* or give another cache_dir"):
            text_folder(tmp_path, cache_dir=tmp_path / cache)


def test_no_folder(tmp_path):
    with pytest.raises(SourceError, match="absent is not a folder"):
        TextFolder(tmp_path / "absent", tiny_tokenizer(), cache_dir=tmp_path)


def test_tokenizers_that_will_not_do(tmp_path):
    write_folder(tmp_path / "data")
    with pytest.raises(SourceError, match="has no eos_token"):
        TextFolder(tmp_path / "data", tiny_tokenizer(eos=None), cache_dir=tmp_path / "cache")
    with pytest.raises(SourceError, match="object is not a fast tokenizer"):
        TextFolder(tmp_path / "data", object(), cache_dir=tmp_path / "cache")


def test_the_manifest_is_the_content(tmp_path):
    manifests = {"base": text_folder(tmp_path).manifest}
    assert text_folder(tmp_path, cache_dir=tmp_path / "elsewhere").manifest == manifests["base"]
    assert TextFolder(tmp_path / "data", tiny_tokenizer(), cache_dir=tmp_path / "c").manifest == manifests["base"]
    other = TextFolder(tmp_path / "data", tiny_tokenizer(280), cache_dir=tmp_path / "cache")
    manifests["tokenizer"] = other.manifest
    (tmp_path / "data" / "b.txt").rename(tmp_path / "data" / "c.txt")
    manifests["name"] = TextFolder(tmp_path / "data", tiny_tokenizer(), cache_dir=tmp_path / "cache").manifest
    (tmp_path / "data" / "c.txt").write_text("the lazy cat")
    manifests["content"] = TextFolder(tmp_path / "data", tiny_tokenizer(), cache_dir=tmp_path / "cache").manifest
    assert len(set(manifests.values())) == 4


def test_using_a_tokenizer_does_not_change_what_it_is(tmp_path):
    before = text_folder(tmp_path).manifest
    tiny_tokenizer()(["the lazy dog"] * 2, truncation=True, max_length=2)
    assert text_folder(tmp_path).manifest == before


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


def test_another_field(tmp_path):
    source = json_lines(tmp_path, [{"body": "fox"}], tiny_tokenizer(), field="body")
    assert source.description["field"] == "body"


def test_data_that_changes_while_it_is_read(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"input_ids": [1, 2, 3]}] * 5000)  # more than one read of the file

    def grow(*_):
        with path.open("a") as file:
            file.write("\n")

    def overwrite(*_):
        with path.open("r+") as file:
            file.seek(0, os.SEEK_END)
            file.seek(file.tell() - 5)
            file.write("4")

    for change in (grow, overwrite):
        with pytest.raises(SourceError, match=r"x\.jsonl changed while it was being read"):
            JsonLines(path, None, cache_dir=tmp_path / "cache", progress=change)
        write_lines(path, [{"input_ids": [1, 2, 3]}] * 5000)
    data = write_folder(tmp_path / "data")
    with pytest.raises(SourceError, match=r"b\.txt changed while it was being read"):
        TextFolder(
            data,
            tiny_tokenizer(),
            cache_dir=tmp_path / "cache",
            progress=lambda *_: (data / "b.txt").write_text("changed"),
        )


def test_progress_counts_bytes_and_only_while_building(tmp_path):
    seen = []
    text_folder(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(len(text.encode()) for text in TEXTS.values())
    assert [pair[1] for pair in seen] == [total] * 3
    assert seen[-1][0] == total
    text_folder(tmp_path, progress=lambda *_: pytest.fail("a cached store was built again"))


def stored(source: StoredSource):
    return [path for path in source.folder.iterdir() if path.is_file()]


def test_a_damaged_store_is_built_again(tmp_path):
    good = text_folder(tmp_path)
    expected = [good.read(i).input_ids.tolist() for i in range(3)]
    names = sorted(path.name for path in stored(good))
    assert names == ["index.json", "lengths.npy", "tokens.arrow", "weights.npy"]
    damages = {
        "flipped": lambda p: p.write_bytes(p.read_bytes()[:-9] + bytes([p.read_bytes()[-9] ^ 1]) + p.read_bytes()[-8:]),
        "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "gone": lambda p: p.unlink(),
        "nested": lambda p: p.write_bytes(b"[" * 100_000),
    }
    for name in names:
        for kind, damage in damages.items():
            if (name, kind) == ("index.json", "flipped"):
                continue  # white space or a skipped name may be what flips
            damage(good.folder / name)
            built = []
            again = text_folder(tmp_path, progress=lambda *a, built=built: built.append(a))
            assert built, (name, kind)
            assert [again.read(i).input_ids.tolist() for i in range(3)] == expected
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [good.manifest, f"{good.manifest}.lock"]


def build_on_a_rank(rank_info, root):
    built = []
    source = TextFolder(root / "data", tiny_tokenizer(), cache_dir=root / "cache", progress=lambda *a: built.append(a))
    return source.manifest, source.lengths.tolist(), bool(built)


def test_builders_side_by_side(tmp_path):
    write_folder(tmp_path / "data", {f"{i}.txt": TEXTS["a/long.py"] for i in range(40)})
    results = run_ranks(build_on_a_rank, 3, tmp_path)
    assert len({(manifest, tuple(lengths)) for manifest, lengths, _ in results}) == 1
    assert [built for *_, built in results].count(True) == 1


def test_without_file_locks_the_first_rename_wins(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("chunkflow.cache.fcntl.flock", no_locks)
    inner = []

    def build_meanwhile(*_):
        if not inner:
            inner.append(None)
            inner.append(text_folder(tmp_path))

    outer = text_folder(tmp_path, progress=build_meanwhile)
    assert outer.read(0).input_ids.tolist() == inner[1].read(0).input_ids.tolist()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [outer.manifest, f"{outer.manifest}.lock"]


KILLED = """
import sys, time
from pathlib import Path
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_memory import MemorySource
def stall(done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(600)
JsonLines(sys.argv[1] + "/x.jsonl", None, cache_dir=sys.argv[1] + "/cache", progress=stall)
"""


def test_a_killed_build_leaves_nothing_half_made(tmp_path):
    lines = [{"input_ids": [i, 1, 2]} for i in range(3000)]
    write_lines(tmp_path / "x.jsonl", lines)
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HOME", None)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    child.stdout.close()
    assert not list((tmp_path / "cache").glob("[!.]*/tokens.arrow"))
    assert list((tmp_path / "cache").glob(".*/tokens.arrow"))
    assert not (tmp_path / "home").exists()  # nothing is littered outside cache_dir
    started = time.monotonic()
    source = JsonLines(tmp_path / "x.jsonl", None, cache_dir=tmp_path / "cache")
    assert time.monotonic() - started < 30  # the dead builder's lock is free
    assert len(source) == 3000
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [source.manifest, f"{source.manifest}.lock"]


def test_a_selection_is_a_source_of_its_own(tmp_path):
    base = json_lines(tmp_path, [{"input_ids": list(range(n))} for n in range(2, 12)])
    some = base.select([7, 0, 3])
    assert some.lengths.tolist() == [9, 2, 5]
    assert some.weights.tolist() == [8, 1, 4]
    assert some.read(2).input_ids.tolist() == list(range(5))
    assert len({base.manifest, some.manifest, base.select([0, 7, 3]).manifest}) == 3
    assert base.select(np.array([7, 0, 3])).manifest == some.manifest
    nested = some.select(range(1, 3))
    assert nested.lengths.tolist() == [2, 5]
    assert nested.manifest != base.select([0, 3]).manifest
    assert fetch(nested, 0).input_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "a selection of 0 samples"),
        ([0, 10], "asks for samples 0 to 10; this source has 0 to 9"),
        ([-1], "asks for samples -1 to -1"),
        ([0.5], "flat list of whole numbers"),
        ([True, False], "flat list of whole numbers"),
    ],
)
def test_bad_selections(tmp_path, indices, message):
    base = json_lines(tmp_path, [{"input_ids": [1, 2]}] * 10)
    with pytest.raises(SourceError, match=message):
        base.select(indices)


def test_reading_outside_is_an_error(tmp_path):
    source = json_lines(tmp_path, [{"input_ids": [1, 2]}] * 10)
    for index in (-1, 10):
        with pytest.raises(IndexError, match="this source has 0 to 9"):
            source.read(index)


class Lying(StoredSource):
    """A source that no longer reads what it announced."""

    sample = Sample(np.array([1, 2]), np.array([2, -100]), np.array([1, 0], dtype=np.float32))

    def read(self, index):
        return self.sample


@pytest.mark.parametrize(
    ("ids", "labels", "weights", "message"),
    [
        ([1, 2, 3], [2, 3, -100], [1, 1, 0], r"sample 0 was announced with 2 tokens and read with .*\(3,\)"),
        ([1, 2], [2, -100], [0.5, 0], r"sample 0 was announced with loss weights of 1\.0 in sum and read with 0\.5"),
        ([1, 2], [2, 3], [1, 0], "sample 0 has a target at its last token"),
        ([1, 2], [-100, -100], [1, 0], "a loss weight where there is no target"),
    ],
)
def test_a_sample_that_is_not_what_was_announced(tmp_path, ids, labels, weights, message):
    source = Lying(json_lines(tmp_path, [{"input_ids": [1, 2]}]).folder)
    fetch(source, 0)
    source.sample = Sample(np.array(ids), np.array(labels), np.array(weights, dtype=np.float32))
    with pytest.raises(SourceError, match=message):
        fetch(source, 0)


def test_bounds_of_samples_in_memory_count_the_targets():
    weights = np.array([1, 0], dtype=np.float32)
    source = MemorySource([Sample(np.array([5, 6]), np.array([label, -100]), weights) for label in (2, 9)])
    assert (source.min_token_id, source.max_token_id) == (2, 9)


def test_a_builder_that_never_ends_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("chunkflow.cache._MOST_WAIT_S", 0.3)
    description = {"kind": "x"}
    lock = tmp_path / f"{manifest_of(description)}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match=rf"another process has held {re.escape(str(lock))} for 0\.3 s"):
            open_or_build(tmp_path, description, list)
