"""A small long-tailed data set of tokens, with targets left out here and there, for tests of the loader."""

import json
from pathlib import Path

import numpy as np

from chunkflow.sources_jsonl import JsonLines

NUM_SAMPLES = 23
CHUNK = 16


def long_tail(folder: Path, *, name="tail", num_samples=NUM_SAMPLES, longest=90, vocab=64, seed=0) -> JsonLines:
    """Samples of 2 to 12 tokens, every fifth one up to `longest`; every third has labels of its own."""
    rng = np.random.default_rng(seed)
    path = folder / f"{name}.jsonl"
    lines = []
    for i in range(num_samples):
        length = int(rng.integers(13, longest + 1)) if i % 5 == 0 else int(rng.integers(2, 13))
        line = {"input_ids": rng.integers(0, vocab, length).tolist()}
        if i % 3 == 0:
            keep = rng.random(length) < 0.6
            keep[-1] = True
            line["labels"] = np.where(keep, line["input_ids"], -100).tolist()
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return JsonLines(path, None, cache_dir=folder / "cache")
