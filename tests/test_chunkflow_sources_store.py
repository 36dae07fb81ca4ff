"""The token store: built once, whole or absent, whatever dies or lies."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset

from chunkflow.cache import open_or_build
from chunkflow.errors import SourceError
from chunkflow.index import StoredSource
from chunkflow.sources import manifest_of
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_text import TextFolder
from tests.source_files import TEXTS, text_folder, write_folder, write_lines
from tests.spawn import run_ranks
from tests.tokenizers_fixture import tiny_tokenizer


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


def test_what_is_stored_is_read_back_and_opens_as_a_data_set(tmp_path):
    """Lists of one batch and of several, labels here and there."""
    rows = [{"input_ids": list(range(1, 3 + n % 5))} | ({"labels": [-100, *range(2, 3 + n % 5)]} if n % 3 else {})
            for n in range(2500)]  # fmt: skip
    source = JsonLines(write_lines(tmp_path / "x.jsonl", rows), None, cache_dir=tmp_path / "cache")
    opened = Dataset.from_file(str(source.folder / "tokens.arrow"))
    assert opened[:] == {"input_ids": [row["input_ids"] for row in rows], "labels": [row.get("labels") for row in rows]}
    for number in (0, 1, 999, 1000, 1001, 2499):
        labels = rows[number].get("labels", rows[number]["input_ids"])
        sample = source.read(number)
        assert sample.input_ids.tolist() == rows[number]["input_ids"]
        assert sample.shift_labels.tolist() == [*labels[1:], -100]


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


def test_a_builder_that_never_ends_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("chunkflow.cache._MOST_WAIT_S", 0.3)
    description = {"kind": "x"}
    lock = tmp_path / f"{manifest_of(description)}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match=rf"another process has held {re.escape(str(lock))} for 0\.3 s"):
            open_or_build(tmp_path, description, list)
