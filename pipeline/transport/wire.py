"""What stands before a tensor on the wire: 16 int64 that say which message it is, its dtype and its shape.

A gloo receive into a larger buffer succeeds silently and one into a smaller buffer aborts the process, so a receiver
must know the shape; and micro-batches may be ragged and change every step, so it cannot know it before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.actions import Phase
from pipeline.errors import PipelineError
from pipeline.transport.base import Message

HEADER_WORDS = 16
_FIXED = 7  # kind, step, phase, stage, micro-batch, dtype, number of dims
_TENSOR, _ABORT = 1, 2
_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip
_PHASES = (Phase.F, Phase.B)


def words_of(message: Message, tensor: Tensor) -> list[int]:
    """Return the HEADER_WORDS words of a tensor's header."""
    if tensor.dtype not in _DTYPES or tensor.ndim > HEADER_WORDS - _FIXED:
        raise PipelineError(
            f"a stage gave a tensor of {tensor.dtype} with {tensor.ndim} dimensions; what travels between ranks has at "
            f"most {HEADER_WORDS - _FIXED}, and one of the dtypes {', '.join(map(str, _DTYPES))}"
        )
    words = [
        _TENSOR, message.step, _PHASES.index(message.phase), message.stage, message.microbatch,
        _DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape,
    ]  # fmt: skip
    return words + [0] * (HEADER_WORDS - len(words))


def encode(message: Message, tensor: Tensor) -> Tensor:
    """Return the header of a tensor, int64 [HEADER_WORDS], on the CPU."""
    return torch.tensor(words_of(message, tensor), dtype=torch.int64)


def encode_abort(reason: str) -> tuple[Tensor, Tensor]:
    """Return header and payload (uint8) that say why this rank gives up."""
    payload = torch.frombuffer(bytearray(reason.encode()[:2000] or b"?"), dtype=torch.uint8)
    words = [_ABORT, payload.numel()] + [0] * (HEADER_WORDS - 2)
    return torch.tensor(words, dtype=torch.int64), payload


def decode(words: Sequence[int]) -> tuple[Message | None, torch.dtype, list[int]]:
    """Return (message, dtype, shape) of what follows a header; no message when the text of an abort follows."""
    if words[0] == _ABORT:
        return None, torch.uint8, [words[1]]
    if words[0] != _TENSOR:
        raise PipelineError(
            f"a message begins with {list(words[:_FIXED])}; the ranks run different versions of pipeline"
        )
    message = Message(words[1], _PHASES[words[2]], words[3], words[4])
    return message, _DTYPES[words[5]], list(words[_FIXED : _FIXED + words[6]])
