import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from chunkflow import ChunkLoader, MemorySource
from chunkflow.errors import SourceError
from chunkflow.sources import Sample
from launch.config import DataConfig, FinetuneConfig, ModelConfig
from launch.corpus import choose_files, jsonl_texts
from launch.data import check_lengths, check_targets, check_vocabulary, load_data, split_held_out
from launch.errors import DataError, ModelError
from launch.tokenizer import EOS, trained_tokenizer
from tests.tiny_chat import write_chat_model

TEXTS = ["def f(x):\n    return x\n", "grüße, 東京\n", "class A:\n    pass\n" * 30]


def folder(tmp_path, texts=TEXTS):
    root = tmp_path / "corpus"
    for number, text in enumerate(texts):
        path = root / f"part{number % 2}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def config(tmp_path, root, **data):
    settings = {"path": str(root), "cache": str(tmp_path / "cache"), "long_files": (), "held_out": 0, **data}
    return FinetuneConfig(data=DataConfig(**settings), model=ModelConfig(vocab_size=300))


def test_the_standard_library_is_chosen_as_the_recipe_says():
    choice = choose_files(DataConfig())
    root = Path(sysconfig.get_path("stdlib"))
    sizes = {name: (root / name).stat().st_size for name in choice.names}
    assert choice.root == root
    assert len(sizes) > 150
    assert [name for name, size in sizes.items() if size > 10_000] == ["pickle.py"]
    assert not [name for name in sizes if name.startswith(("site-packages", "test/")) or "/tests/" in name]
    assert "files left out, larger than data.max_file_bytes = 10000" in choice.note
    assert "What is taken is whole" in choice.note


def test_large_files_are_left_out_of_the_source_and_counted(tmp_path):
    root = folder(tmp_path)
    (root / "odd[1].py").write_text("x" * 200)
    data = load_data(config(tmp_path, root, max_file_bytes=100))
    assert len(data.train) == 2
    assert "2 of 4 files left out" in data.notes[0]
    assert len(load_data(config(tmp_path, root, max_file_bytes=100, long_files=("odd[1].py",))).train) == 3
    whole = load_data(config(tmp_path, root, max_file_bytes=None))
    assert (len(whole.train), whole.notes) == (4, ())


def test_a_long_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data.long_files names \['nope.py'\], not among the 3 files"):
        load_data(config(tmp_path, folder(tmp_path), long_files=("nope.py",)))


def test_files_are_trained_whole(tmp_path):
    data = load_data(config(tmp_path, folder(tmp_path), max_file_bytes=None))
    decoded = {data.tokenizer.decode(data.train.read(index).input_ids) for index in range(len(data.train))}
    assert decoded == {text + EOS for text in TEXTS}


def test_a_vocabulary_is_trained_once_and_always_the_same(tmp_path):
    trained = [trained_tokenizer(lambda: TEXTS, vocab_size=300, cache=tmp_path / place) for place in "ab"]
    assert trained[0].backend_tokenizer.to_str() == trained[1].backend_tokenizer.to_str()
    assert trained[0].eos_token == EOS
    made = list((tmp_path / "a" / "tokenizers").iterdir())
    again = trained_tokenizer(lambda: TEXTS, vocab_size=300, cache=tmp_path / "a")
    assert again.backend_tokenizer.to_str() == trained[0].backend_tokenizer.to_str()
    assert list((tmp_path / "a" / "tokenizers").iterdir()) == made
    assert len(made) == 1
    trained_tokenizer(lambda: TEXTS[:2], vocab_size=300, cache=tmp_path / "a")
    trained_tokenizer(lambda: TEXTS, vocab_size=290, cache=tmp_path / "a")
    assert len(list((tmp_path / "a" / "tokenizers").iterdir())) == 3


@pytest.mark.parametrize("damage", ["", "{", None])
def test_a_damaged_vocabulary_is_trained_again(tmp_path, damage):
    before = trained_tokenizer(lambda: TEXTS, vocab_size=300, cache=tmp_path)
    (file,) = (tmp_path / "tokenizers").glob("*/tokenizer.json")
    file.unlink() if damage is None else file.write_text(damage)
    after = trained_tokenizer(lambda: TEXTS, vocab_size=300, cache=tmp_path)
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()


def test_any_text_survives_the_vocabulary(tmp_path):
    tokenizer = trained_tokenizer(lambda: TEXTS, vocab_size=300, cache=tmp_path)
    text = "日本 ж \x00\t\r\n 😀 \u2028 x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_jsonl_texts_and_ids(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"body": text}) for text in TEXTS]
    path.write_text("\n".join(lines) + "\n")
    data = load_data(config(tmp_path, path, kind="jsonl", field="body"))
    assert len(data.train) == 3
    path.write_text('{"input_ids": [5, 6, 7]}\n')
    data = load_data(config(tmp_path, path, kind="jsonl"))
    assert (data.tokenizer, data.train.max_token_id) == (None, 7)


def test_the_vocabulary_is_read_past_bad_lines_which_the_source_names(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut of\n[1]\n')
    assert list(jsonl_texts(path, "text")) == ["fine"]
    with pytest.raises(DataError, match=r"data.jsonl.*2"):
        load_data(config(tmp_path, path, kind="jsonl"))
    path.write_text('{"text": "fine"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match=r"data.jsonl:2: not JSON"):
        load_data(config(tmp_path, path, kind="jsonl"))


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_no_data_at_all(tmp_path, kind):
    with pytest.raises(DataError, match="nowhere"):
        load_data(config(tmp_path, tmp_path / "nowhere", kind=kind))


def test_an_empty_folder_and_an_empty_file(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match=r"no file of .*corpus matches"):
        load_data(config(tmp_path, tmp_path / "corpus"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"data.path .*empty.jsonl: there is no sample"):
        load_data(config(tmp_path, tmp_path / "empty.jsonl", kind="jsonl"))


def test_held_out_samples_are_the_same_every_time_and_never_trained(tmp_path):
    root = folder(tmp_path, [f"value_{n} = {n}\n" * (n + 1) for n in range(20)])
    source = load_data(config(tmp_path, root, max_file_bytes=None)).train
    train, held = split_held_out(source, count=5, seed=3, keep=1)
    again, held_again = split_held_out(source, count=5, seed=3, keep=1)
    assert (train.manifest, held.manifest) == (again.manifest, held_again.manifest)
    assert split_held_out(source, count=5, seed=4, keep=1)[1].manifest != held.manifest
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train.lengths, *held.lengths]) == sorted(source.lengths)
    assert train.lengths.max() == source.lengths.max()
    texts = [{part.read(n).input_ids.tobytes() for n in range(len(part))} for part in (train, held)]
    assert not texts[0] & texts[1]
    assert split_held_out(source, count=0, seed=3, keep=1) == (source, None)


@pytest.mark.parametrize(("count", "keep"), [(3, 0), (4, 0), (3, 1)])
def test_too_many_held_out(tmp_path, count, keep):
    source = load_data(config(tmp_path, folder(tmp_path), max_file_bytes=None)).train
    with pytest.raises(DataError, match=rf"data.held_out is {count}, and the data has 3 samples"):
        split_held_out(source, count=count, seed=0, keep=keep)


def test_as_many_held_out_as_leaves_the_long_one(tmp_path):
    source = load_data(config(tmp_path, folder(tmp_path), max_file_bytes=None)).train
    train, _ = split_held_out(source, count=2, seed=0, keep=1)
    assert train.lengths.tolist() == [np.max(source.lengths)]


def test_token_ids_outside_the_vocabulary(tmp_path):
    source = load_data(config(tmp_path, folder(tmp_path), max_file_bytes=None)).train
    check_vocabulary(source, source.max_token_id + 1)
    with pytest.raises(DataError, match=f"token id {source.max_token_id}, outside the model's vocabulary of"):
        check_vocabulary(source, source.max_token_id)


def test_samples_longer_than_the_model_has_positions(tmp_path):
    source = load_data(config(tmp_path, folder(tmp_path), max_file_bytes=None)).train
    longest = int(source.lengths.max())
    check_lengths(source, longest)
    check_lengths(source, None)
    with pytest.raises(DataError, match=f"has {longest} tokens, and the model has learned {longest - 1} positions"):
        check_lengths(source, longest - 1)


def trained_without_error(loader, steps):
    for step in range(steps):
        try:
            loader.plan(step)
        except SourceError:
            return step
    return None


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_a_step_without_a_target_is_found_before_the_first(batch, count):
    """Just where the loader would come to it."""
    samples = [Sample(np.arange(3), np.array([1, 2, -100]), np.array([1, 1, 0], np.float32)) for _ in range(10 - count)]
    samples += [Sample(np.arange(3), np.full(3, -100), np.zeros(3, np.float32)) for _ in range(count)]
    loader = ChunkLoader(
        MemorySource(samples), chunk_tokens=8, global_batch=batch, epochs=3, seed=5, rank=0, world_size=1
    )
    for steps in (1, 2, 4, loader.num_steps):
        wrong = trained_without_error(loader, steps)
        if wrong is None:
            check_targets(loader, steps)
        else:
            with pytest.raises(DataError, match=f"step {wrong + 1} would train no target: samples "):
                check_targets(loader, steps)


@pytest.mark.parametrize("pattern", ["", "/etc/*", "**x", "../*", "*/../../*"])
def test_a_pattern_that_is_no_relative_glob(tmp_path, pattern):
    with pytest.raises(DataError, match=r"data.pattern is .*no glob relative to"):
        load_data(config(tmp_path, folder(tmp_path), pattern=pattern))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache .*file: .*Not a directory"):
        load_data(config(tmp_path, folder(tmp_path), cache=str(tmp_path / "file")))


def test_a_model_by_its_name_is_looked_for_nowhere(tmp_path):
    settings = replace(config(tmp_path, folder(tmp_path)), model=ModelConfig(path="gpt2"))
    with pytest.raises(ModelError, match=r"model.path 'gpt2' is no folder; download"):
        load_data(settings)


def test_a_model_folder_without_a_tokenizer(tmp_path):
    settings = config(tmp_path, folder(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=r"model.path .* has no tokenizer"):
        load_data(replace(settings, model=ModelConfig(path=str(tmp_path / "model"))))


CHATS = [
    [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"the number {n}"}]
    for n in range(6)
]


def opened(tmp_path, path, **data):
    settings = config(tmp_path, path, kind="auto", **data)
    return load_data(replace(settings, model=ModelConfig(path=str(write_chat_model(tmp_path / "model")))))


def targets(data):
    samples = [data.train.read(number) for number in range(len(data.train))]
    return [data.tokenizer.decode(sample.shift_labels[sample.shift_labels >= 0]) for sample in samples]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets", "datasets-split"])
def test_chats_in_any_form_are_opened_by_what_they_are(tmp_path, form):
    rows, path = [{"messages": chat} for chat in CHATS], tmp_path / f"chats.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "datasets":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        DatasetDict({"valid": Dataset.from_list(rows)}).save_to_disk(path)
    data = opened(tmp_path, path, held_out=2, split="valid" if form == "datasets-split" else "train")
    assert (len(data.train), len(data.held_out)) == (4, 2)
    answers = {chat[1]["content"] + "<|im_end|>\n" for chat in CHATS}
    assert len(set(targets(data)) & answers) == 4


def test_prompts_and_completions_and_texts_in_parquet(tmp_path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"prompt": ["2 + 2 = ", "3 + 3 = "], "completion": ["4", "6"]}), path)
    assert targets(opened(tmp_path, path)) == ["4<eos>", "6<eos>"]
    pq.write_table(pa.table({"body": TEXTS}), path)
    assert len(opened(tmp_path, path, field="body").train) == 3


def test_auto_opens_json_lines_and_tokens_without_a_model_and_says_what_needs_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    auto, plain = (load_data(config(tmp_path, path, kind=kind)) for kind in ("auto", "jsonl"))
    assert auto.train.manifest == plain.train.manifest
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2, 3], [4, 5]]}), table)
    assert load_data(config(tmp_path, table, kind="auto")).train.lengths.tolist() == [3, 2]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    for kind in ("auto", "jsonl"):
        with pytest.raises(DataError, match=r"data.jsonl:1: messages, and no tokenizer .* model.path names it; a new"):
            load_data(config(tmp_path, path, kind=kind))
    pq.write_table(pa.table({"text": TEXTS}), table)
    with pytest.raises(DataError, match=r"table.parquet.*no tokenizer was given.*model.path names it"):
        load_data(config(tmp_path, table, kind="auto"))


@pytest.mark.parametrize(("name", "split", "text"), [
    ("nowhere/at-all", "train", r"data.path nowhere/at-all: .*neither a file nor a folder"),
    ("rows", "test", "has the splits train and not 'test'"),
])  # fmt: skip
def test_data_that_is_nowhere(tmp_path, name, split, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DatasetDict({"train": Dataset.from_list([{"text": "x"}])}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match=text):
        opened(tmp_path, name, split=split)
