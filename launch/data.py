"""The data of a job: opened, and split into what is trained and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from chunkflow import ChunkLoader
from chunkflow.errors import NoTokenizerError, SourceError
from chunkflow.sampler import global_batch
from chunkflow.sources import Source
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_text import TextFolder
from launch.config import DataConfig, FinetuneConfig
from launch.corpus import FolderChoice, choose_files, jsonl_texts
from launch.errors import DataError
from launch.functions import write_functions
from launch.pretrained import pretrained_tokenizer
from launch.tokenizer import trained_tokenizer

_EPOCHS_CHECKED = 1000
"""Before the first step, for what each of them would train."""


@dataclass(frozen=True, slots=True)
class Data:
    """What a job trains and evaluates on."""

    train: Source
    held_out: Source | None
    tokenizer: PreTrainedTokenizerBase | None
    """None for samples of token ids without a model to name them."""
    notes: tuple[str, ...]
    """What was left out, in words."""


def load_data(config: FinetuneConfig) -> Data:
    """Open the data of a job; deterministic. Caches tokens and vocabulary, so do it on one rank first.

    Raises DataError naming data.path, and the file or line, when the data cannot be used.
    """
    data, notes = config.data, []
    try:
        if data.kind == "functions":
            return _open_functions(config)
        if data.kind == "text":
            choice = choose_files(data)
            notes += [choice.note] if choice.note else []
            tokenizer, source = _open_folder(config, choice)
        else:
            tokenizer, source = _open_lines(config) if data.kind == "jsonl" else _open_any(config)
    except NoTokenizerError as error:
        raise DataError(f"data.path {data.path}: {error}: {_who_has_one(config)}") from error
    except SourceError as error:
        raise DataError(f"data.path {data.path}: {error}") from error
    except OSError as error:
        raise DataError(f"data.path {data.path}, cached in data.cache {data.cache}: {error}") from error
    notes += [str(skipped) for skipped in source.skipped]
    train, held_out = split_held_out(source, count=data.held_out, seed=config.run.seed, keep=len(data.long_files))
    return Data(train, held_out, tokenizer, tuple(notes))


def _open_folder(config: FinetuneConfig, choice: FolderChoice) -> tuple[PreTrainedTokenizerBase | None, Source]:
    _require_files(config.data, choice)
    tokenizer = load_tokenizer(config, choice.texts)
    assert tokenizer is not None
    cache = Path(config.data.cache)
    pattern, exclude = config.data.pattern, choice.exclude
    return tokenizer, TextFolder(choice.root, tokenizer, pattern=pattern, exclude=exclude, cache_dir=cache)


def _open_lines(config: FinetuneConfig) -> tuple[PreTrainedTokenizerBase | None, Source]:
    data = config.data
    tokenizer = load_tokenizer(config, lambda: jsonl_texts(Path(data.path), data.field))
    return tokenizer, JsonLines(data.path, tokenizer, field=data.field, cache_dir=Path(data.cache))


def _open_any(config: FinetuneConfig) -> tuple[PreTrainedTokenizerBase | None, Source]:
    from chunkflow.sources_open import open_source  # Parquet's reader; other kinds of data do without

    data, path = config.data, config.model.path
    if path is None and Path(data.path).suffix in (".jsonl", ".json"):
        return _open_lines(config)
    tokenizer = None if path is None else pretrained_tokenizer(path, cache=Path(data.cache))
    return tokenizer, open_source(data.path, tokenizer, cache_dir=Path(data.cache), split=data.split, field=data.field)


def _who_has_one(config: FinetuneConfig) -> str:
    """Return where a tokenizer, or a chat template, comes from in a job."""
    if config.model.path is None:
        return "model.path names it; a new model's vocabulary is trained on text and jsonl, and knows no chats"
    return f"model.path {config.model.path} has none; give a model that was made for chats, such as smollm2"


def _open_functions(config: FinetuneConfig) -> Data:
    data, cache = config.data, Path(config.data.cache)
    if config.model.path is None:
        raise DataError(
            "data.kind functions asks for functions in chats, and a new model's tokenizer has no chat template; set "
            "model.path to a model that has one, such as smollm2"
        )
    tokenizer = pretrained_tokenizer(config.model.path, cache=cache)
    choice = choose_files(replace(data, max_file_bytes=None, long_files=()))
    _require_files(data, choice)
    limit, count, seed = data.max_file_bytes, data.held_out, config.run.seed
    files = write_functions(choice, max_bytes=limit, held_out=count, seed=seed, cache=cache)
    train = JsonLines(files.train, tokenizer, cache_dir=cache)
    held_out = JsonLines(files.held_out, tokenizer, cache_dir=cache) if count else None
    skipped = [str(skipped) for source in (train, held_out) if source is not None for skipped in source.skipped]
    return Data(train, held_out, tokenizer, (*files.notes, *skipped))


def _require_files(data: DataConfig, choice: FolderChoice) -> None:
    if not choice.names:
        limit = "" if data.kind == "functions" else f", and has at most data.max_file_bytes = {data.max_file_bytes}"
        raise DataError(
            f"no file of {choice.root} matches data.pattern {data.pattern!r}, is not in data.exclude{limit}"
        )


def load_tokenizer(config: FinetuneConfig, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer, or one trained on the texts for a model that is new."""
    cache = Path(config.data.cache)
    if config.model.path is not None:
        return pretrained_tokenizer(config.model.path, cache=cache)
    return trained_tokenizer(texts, vocab_size=config.model.vocab_size, cache=cache)


def split_held_out(source: Source, *, count: int, seed: int, keep: int) -> tuple[Source, Source | None]:
    """Return (training samples, held-out samples), decided by the lengths and the seed; None for none.

    The longest `keep` samples are always trained. Raises DataError when nothing would be left to train on.
    """
    if count == 0:
        return source, None
    by_length = np.argsort(-source.lengths, kind="stable")
    candidates = np.sort(by_length[keep:])
    if count >= len(candidates) + min(keep, 1):
        raise DataError(
            f"data.held_out is {count}, and the data has {len(source)} samples, {keep} of them kept for training as "
            "data.long_files; hold out fewer"
        )
    chosen = np.random.default_rng(seed).choice(candidates, size=count, replace=False)
    rest = np.setdiff1d(np.arange(len(source)), chosen)
    return source.select(rest), source.select(np.sort(chosen))


def check_lengths(source: Source, positions: int | None) -> None:
    """Raise DataError when a sample is longer than the model has positions; None for no limit."""
    longest = int(source.lengths.max())
    if positions is not None and longest > positions:
        raise DataError(
            f"the longest sample has {longest} tokens, and the model has learned {positions} positions; leave such "
            "samples out, or use a model whose positions are computed"
        )


def check_targets(loader: ChunkLoader, steps: int) -> None:
    """Raise DataError when one of the run's first `steps` trains only samples without a target. Reads no sample.

    The loader would say so itself, but once it gets there, when the data cannot be another any more.
    """
    weights, batch, per_epoch = loader.source.weights, loader.global_batch, loader.steps_per_epoch
    smallest = len(weights) - (per_epoch - 1) * batch
    if np.count_nonzero(weights <= 0) < smallest:
        return
    for epoch in range(min(-(-steps // per_epoch), _EPOCHS_CHECKED)):
        order = global_batch(loader.seed, epoch, 0, num_samples=len(weights), global_batch=len(weights))
        some = np.logical_or.reduceat(weights[order] > 0, np.arange(0, len(order), batch))
        without = np.flatnonzero(~some[: steps - epoch * per_epoch])
        if without.size:
            samples = order[without[0] * batch :][:batch]
            raise DataError(
                f"step {epoch * per_epoch + int(without[0]) + 1} would train no target: samples "
                f"{samples[:8].tolist()} ... have none; leave such samples out, or raise chunks.global_batch"
            )


def check_vocabulary(source: Source, vocab_size: int) -> None:
    """Raise DataError when a token or target of the source is not in a vocabulary of this size."""
    if source.min_token_id < 0 or source.max_token_id >= vocab_size:
        wrong = source.min_token_id if source.min_token_id < 0 else source.max_token_id
        raise DataError(
            f"the data has token id {wrong}, outside the model's vocabulary of {vocab_size} (ids 0 to "
            f"{vocab_size - 1}); use the tokenizer that belongs to the model, or a model with a larger vocabulary"
        )
