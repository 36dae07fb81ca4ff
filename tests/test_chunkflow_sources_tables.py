"""Parquet files and data sets as sources, and whatever `open_source` is given."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from chunkflow.cache import open_or_build
from chunkflow.errors import ChunkflowError, SourceError
from chunkflow.model_open import open_model
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
    with pytest.raises(SourceError, match=r"list is no data set; give a path, .*from_list"):
        open_source([{"input_ids": [1, 2]}], None, **cache)
    rows = Dataset.from_dict({"input_ids": [[1, 2]]})
    assert len(open_source(DatasetDict({"train": rows}), None, **cache)) == 1
    with pytest.raises(SourceError, match="the data has the splits test and not 'train'"):
        open_source(DatasetDict({"test": rows}), None, **cache)
    with pytest.raises(SourceError, match=r"has a transform that runs as rows are read .* use map"):
        open_source(rows.with_transform(lambda batch: batch), None, **cache)
    for name in ("no/such/data", "./no-such", "absent.jsonl"):
        with pytest.raises(SourceError, match="is neither a file nor a folder here, nor a name on the Hub"):
            open_source(name, None, **cache)


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_file_without_rows_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / name, tmp_path / "folder" / name):
        if name == "x.parquet":
            pq.write_table(pa.table({"input_ids": pa.array([], pa.list_(pa.int64()))}), path)
        else:
            path.touch()
    for path in (tmp_path / name, tmp_path / "folder"):
        with pytest.raises(SourceError, match=rf"{path.name} has 0 (rows|lines); there is nothing to train on"):
            open_source(path, None, cache_dir=tmp_path / "cache")


def test_a_name_where_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    """Said at once; the libraries alone would try again for a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    cache, offline = {"cache_dir": tmp_path / "cache"}, datasets.config.HF_HUB_OFFLINE
    with pytest.raises(SourceError, match=r"the Hub cannot be reached \(\w+: .*\), and it is not in the cache"):
        open_source("no/such", None, **cache)
    with pytest.raises(ChunkflowError, match="the Hub cannot be reached"):
        open_model("no/such")
    assert datasets.config.HF_HUB_OFFLINE is offline


def test_a_name_that_is_not_in_the_cache(tmp_path, monkeypatch):
    cache = {"cache_dir": tmp_path / "cache"}
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


def test_a_folder_of_which_a_part_would_be_left_out_or_trained_as_syntax(tmp_path):
    """Both kinds of tables: one was taken and the other not. Tables one folder down: their JSON was the text."""
    for name in ("both", "nested/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    pq.write_table(pa.table({"input_ids": [[4, 5]]}), tmp_path / "both" / "b.parquet")
    with pytest.raises(SourceError, match=r"both holds \*\.parquet and \*\.jsonl files"):
        open_source(tmp_path / "both", None, cache_dir=tmp_path / "cache")
    with pytest.raises(SourceError, match=r"nested/one/a\.jsonl is a table: open .*nested/one, or make a TextFolder"):
        open_source(tmp_path / "nested", tiny_tokenizer(), cache_dir=tmp_path / "cache")
    assert len(open_source(tmp_path / "nested" / "one", None, cache_dir=tmp_path / "cache")) == 1
