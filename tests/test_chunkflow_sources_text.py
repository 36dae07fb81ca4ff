"""Folders of text as a source: whole samples, shifted once, identified by content."""

import os
from fnmatch import fnmatchcase

import numpy as np
import pytest

from chunkflow.errors import SourceError
from chunkflow.matching import matching
from chunkflow.sources import Source
from chunkflow.sources_text import TextFolder
from tests.source_files import TEXTS, text_folder, write_folder
from tests.tokenizers_fixture import tiny_tokenizer


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


PLACES = ["a.py", "b/a.py", "b/c/a.txt", "b/tests/d/a.py", "tests/a.py", ".hid/a.py", "site/deep/er/a.py", "b/x.py/y"]


@pytest.mark.parametrize("pattern", ["**/*.py", "**/*", "*.py", "b/**/*.py", "**/b/*.py", "**/tests/*/*", "**/../a.py"])
@pytest.mark.parametrize("exclude", [[], ["site/*", "*/tests/*"], ["b*"], ["*.txt", "[x*", "b/?/a.txt"]])
def test_what_matches_is_what_pathlib_finds_less_what_is_excluded(tmp_path, pattern, exclude):
    write_folder(tmp_path, dict.fromkeys(PLACES, "x"))
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern)}
    wanted = sorted(name for name in found if not any(fnmatchcase(name, glob) for glob in exclude))
    assert list(matching(tmp_path, pattern, exclude)) == wanted


def test_a_folder_that_is_excluded_whole_is_not_looked_into(tmp_path, monkeypatch):
    write_folder(tmp_path, dict.fromkeys(PLACES, "x"))
    looked, scandir = set(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.add(os.path.relpath(path, tmp_path)) or scandir(path))
    assert len(matching(tmp_path, "**/*.py", ["site/*", "*/tests/*"])) == 5
    assert looked == {".", "b", "b/c", "b/x.py", "tests", ".hid"}


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
