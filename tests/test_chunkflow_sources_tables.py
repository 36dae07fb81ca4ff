"""Parquet files and data sets as sources, and whatever `open_source` is given."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from chunkflow.cache import open_or_build
from chunkflow.errors import SourceError
from chunkflow.sources_open import open_source
from chunkflow.sources_tables import FromDataset, ParquetFiles
from tests.tokenizers_fixture import tiny_tokenizer

ROWS = {"input_ids": [[i, 1, 2, i] for i in range(50)], "labels": [[-100, 1, 2, i] for i in range(50)]}
TEXTS = {"text": ["the lazy dog", "fox", ""]}


def contents(source):
    return [(s.input_ids.tolist(), s.shift_labels.tolist()) for s in map(source.read, range(len(source)))]


def test_tables_read_what_json_lines_read(tmp_path):
    rows = [{name: values[i] for name, values in ROWS.items()} for i in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tables").mkdir()
    for n in range(2):
        pq.write_table(pa.table(ROWS).slice(25 * n, 25), tmp_path / "tables" / f"{n}.parquet")
    dataset = Dataset.from_dict(ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"))
    opened = [
        open_source(data, None, cache_dir=tmp_path / "cache")
        for data in (tmp_path / "x.jsonl", tmp_path / "tables", dataset, str(tmp_path / "saved"))
    ]
    assert len({json.dumps(contents(source)) for source in opened}) == 1
    assert opened[0].read(7).shift_labels.tolist() == [1, 2, 7, -100]
    assert opened[2].manifest == opened[3].manifest  # its contents, wherever they are


def test_texts_of_a_table(tmp_path):
    pq.write_table(pa.table(TEXTS), tmp_path / "x.parquet")
    for source in (
        open_source(tmp_path / "x.parquet", tiny_tokenizer(), cache_dir=tmp_path / "cache"),
        open_source(Dataset.from_dict(TEXTS), tiny_tokenizer(), cache_dir=tmp_path / "cache"),
    ):
        assert [tiny_tokenizer().decode(source.read(i).input_ids) for i in range(2)] == [
            "the lazy dog<eos>",
            "fox<eos>",
        ]
        assert source.skipped[0].count == 1


def test_a_data_set_is_its_rows_in_their_order(tmp_path):
    dataset = Dataset.from_dict(ROWS)

    def manifest(data):
        return FromDataset(data, None, cache_dir=tmp_path).manifest

    assert manifest(dataset) == manifest(Dataset.from_dict(ROWS))
    shuffled = dataset.shuffle(seed=1)
    assert manifest(shuffled) != manifest(dataset)
    first = int(shuffled[0]["input_ids"][0])
    assert FromDataset(shuffled, None, cache_dir=tmp_path).read(0).input_ids[0] == first


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    cache = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(SourceError, match=r"bad\.parquet cannot be read as Parquet"):
        open_source(tmp_path / "bad.parquet", None, **cache)
    with pytest.raises(SourceError, match=r"data\.csv: data files end in \.jsonl or \.parquet"):
        open_source(tmp_path / "data.csv", None, **cache)
    with pytest.raises(SourceError, match=r"folder is a folder of texts, and no tokenizer"):
        open_source(tmp_path / "folder", None, **cache)
    with pytest.raises(SourceError, match="IterableDataset has no rows by number; train it with StreamLoader"):
        open_source(IterableDataset.from_generator(lambda: iter([])), None, **cache)
    with pytest.raises(SourceError, match="the data set has 0 rows"):
        open_source(Dataset.from_dict({"input_ids": []}), None, **cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"'no/such' is neither a file nor a folder here, nor a data set"):
        open_source("no/such", None, **cache)


def test_a_parquet_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(ROWS), path, row_group_size=10)

    def change(done, total):
        with path.open("r+b") as file:
            file.seek(-20, 2)
            file.write(b"\0")

    with pytest.raises(SourceError, match=r"x\.parquet (changed while it was being read|cannot be read to its end)"):
        ParquetFiles(path, None, cache_dir=tmp_path / "cache", progress=change)
    assert not list((tmp_path / "cache").glob("*/index.json"))


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PAR1")])
def test_a_table_that_goes_between_its_digest_and_its_rows(tmp_path, monkeypatch, change):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(ROWS), path)

    def late(*args):
        change(path)
        return open_or_build(*args)

    monkeypatch.setattr("chunkflow.sources_tables.open_or_build", late)
    with pytest.raises(SourceError, match=r"the data cannot be read to its end: .*did it change"):
        ParquetFiles(path, None, cache_dir=tmp_path / "cache")
