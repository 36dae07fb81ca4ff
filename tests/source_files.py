"""Folders and JSON lines on disk, for tests of sources."""

import json
from pathlib import Path

from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_text import TextFolder
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
