"""TRL's `SFTTrainer` in chunks: TRL prepares the data set and decides what is trained, chunks train it, nothing cut.

class Chunked(ChunkedSFTTrainer):
    chunks = PlannerConfig(chunk_tokens=8192)
trainer = Chunked(model, args=SFTConfig(max_length=None, ...), train_dataset=dataset)
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from chunkflow.adapters.trainer import ChunkMixin
from chunkflow.errors import ChunkflowError
from chunkflow.sources import Source

try:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise ImportError(f"{__name__} needs TRL: pip install 'longrail[trl]' ({error})") from error


class ChunkedSFTTrainer(ChunkMixin, SFTTrainer):
    """`SFTTrainer` over `ChunkMixin`. Set `chunks`. Raises ChunkflowError for what would cut samples or pack twice."""

    cross_entropy_of = (Trainer, SFTTrainer)

    def __init__(self, model: Any, args: Any = None, *others: Any, **more: Any) -> None:
        if isinstance(args, SFTConfig):  # before TRL has tokenized, and cut, everything
            _check(args)
        super().__init__(model, args, *others, **more)

    def source(self, dataset: Any) -> Source:
        """See `ChunkMixin.source`."""
        _check(self.args)
        return super().source(dataset)


def _check(args: Any) -> None:
    """Raise ChunkflowError for settings that would cut samples, pack twice or train another loss."""
    if args.packing or args.eval_packing or args.padding_free:
        raise ChunkflowError("SFTConfig.packing, eval_packing and padding_free must be off; chunks are packed already")
    if args.max_length is not None:
        raise ChunkflowError(
            f"SFTConfig.max_length is {args.max_length}, and TRL has cut longer samples there already; set it to "
            "None: chunks train samples of any length"
        )
    if args.loss_type not in ("nll", "chunked_nll"):
        raise ChunkflowError(
            f"SFTConfig.loss_type is {args.loss_type!r}; chunks train the cross entropy of each target: use 'nll'"
        )
