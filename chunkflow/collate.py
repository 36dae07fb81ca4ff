"""A planned chunk to tensors.

    T  tokens of the chunk          input_ids, position_ids, shift_labels   int64   [1, T]
    S  segments of the chunk        loss_weights                            float32 [1, T]
    P  tokens of prefix (groups)    cu_seqlens_q                            int32   [S + 1]   0 .. T
                                    cu_seqlens_k                            int32   [S + 1]   0 .. P + T

Only the first segment of a group's chunk has a prefix: its q tokens are the last of its P + q keys. Every other segment
is a whole sequence, whose positions start at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from chunkflow.records import Chunk
from chunkflow.sources import Sample, Source, fetch


def collate(chunks: Iterable[Chunk], source: Source) -> tuple[Chunk, ...]:
    """Return the chunks with their tensors. Raises SourceError on a sample that is not what the plan was made from."""
    loaded: list[Chunk] = []
    samples: dict[int, Sample] = {}
    for chunk in chunks:
        # The chunks of a group stand together, so what the last chunk needed is all that is worth keeping.
        needed = dict.fromkeys(segment.sample for segment in chunk.segments)
        samples = {index: samples.get(index) or fetch(source, index) for index in needed}
        loaded.append(replace(chunk, payload=_tensors(chunk, samples)))
    return tuple(loaded)


def _tensors(chunk: Chunk, samples: Mapping[int, Sample]) -> dict[str, Tensor]:
    parts = [(samples[s.sample], slice(s.start, s.start + s.length)) for s in chunk.segments]
    lengths = [s.length for s in chunk.segments]
    key_lengths = [lengths[0] + chunk.prefix, *lengths[1:]]
    return {
        "input_ids": _row([sample.input_ids[run] for sample, run in parts], np.int64),
        "position_ids": _row([np.arange(s.start, s.start + s.length) for s in chunk.segments], np.int64),
        "shift_labels": _row([sample.shift_labels[run] for sample, run in parts], np.int64),
        "loss_weights": _row([sample.loss_weights[run] for sample, run in parts], np.float32),
        "cu_seqlens_q": _cumulative(lengths),
        "cu_seqlens_k": _cumulative(key_lengths),
    }


def _row(parts: list[np.ndarray], dtype: type[np.generic]) -> Tensor:
    """Return the parts one behind another, [1, T]."""
    return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False)).unsqueeze(0)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
