"""`ChunkRunner`: the loss call of a training loop, over chunks, with the gradients of whole sequences."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chunkflow.attention.interface import attention_of
from chunkflow.errors import ChunkflowError, SourceError
from chunkflow.executor import StepExecutor
from chunkflow.fit import OnOperation, timed
from chunkflow.program import operations
from chunkflow.records import Chunk, StepBatch
from chunkflow.reduce import sum_gradients
from chunkflow.sources import NO_TARGET
from chunkflow.support import require_exact
from chunkflow.world import resolve_group


class ChunkRunner:
    """Trains the chunks of one step with exact gradients.

    `model` is a transformers causal LM, plain or wrapped in DDP (whose own reduction is not used). `retain` is how many
    chunks of a long sequence keep their activations: memory is set by `chunk_tokens * retain`. `group` are the ranks
    that share the global batch: the default process group where there is one, `SINGLE` for this process alone.

    Made on every rank. Raises UnsupportedModelError, naming the layer and the reason, for a model that could not be
    trained exactly; it finds out by running a few tokens.
    """

    def __init__(
        self, model: nn.Module, *, retain: int = 1, group: dist.ProcessGroup | str | None = None, seed: int = 0
    ) -> None:
        if retain < 1:
            raise ChunkflowError(f"retain is {retain}; it must be at least 1, the chunk that is trained now")
        if isinstance(model, DistributedDataParallel):
            group = model.process_group if group is None else group
            model = model.module
        self._group = resolve_group(group)
        self._parts = require_exact(model)
        self._retain = retain
        self._seed = seed
        self.on_operation: OnOperation | None = None
        """Called with every op of training, its chunk and the seconds it took."""

    @property
    def num_positions(self) -> int | None:
        """Tokens that the longest sequence may have, where the model has learned its positions; None for no limit."""
        return self._parts.num_positions

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Run one step's forward and backward; return the step's mean loss over all ranks, fp64, 0-d, detached.

        Every rank of the group calls once a step. Afterwards `.grad` of every parameter holds the gradient of that loss
        (added to what was there), the same on every rank; call `optimizer.step()` next. Activations of at most `retain`
        chunks are alive at a time. Train or eval mode is the caller's.
        """
        self._check_tokens(batch)
        parameters = [p for p in self._parts.model.parameters() if p.requires_grad]
        before = self._set_aside(parameters)
        executor = StepExecutor(self._parts, batch.chunks, dropout_seed=self._dropout_seed(batch))
        with attention_of(self._parts.model):
            ops = operations(batch.chunks, self._retain)
            if self.on_operation is not None:
                ops = timed(ops, batch.chunks, self.on_operation)
            loss = executor.train(ops, denominator=batch.denominator)
        if self._group is not None:
            sum_gradients(parameters, self._group)
        for parameter, grad in before:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return self._over_ranks(loss)

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Return the step's mean loss over all ranks, fp64, without gradients. Every rank of the group calls."""
        self._check_tokens(batch)
        executor = StepExecutor(self._parts, batch.chunks, dropout_seed=self._dropout_seed(batch))
        with attention_of(self._parts.model):
            return self._over_ranks(executor.score(denominator=batch.denominator))

    def _dropout_seed(self, batch: StepBatch) -> int:
        return self._seed * 1_000_003 + batch.step

    def _set_aside(self, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """Take away gradients of earlier steps: they are summed over the ranks already and must not be again."""
        if self._group is None:
            return []
        before = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        return before

    def _over_ranks(self, loss: Tensor) -> Tensor:
        if self._group is None:
            return loss
        loss = loss.to(self._parts.head.weight.device)
        dist.all_reduce(loss, group=self._group)
        return loss.cpu()

    def _check_tokens(self, batch: StepBatch) -> None:
        for chunk in batch.chunks:
            _check_positions(chunk, self._parts.num_positions)
            tensors = chunk.tensors()
            labels, weights = tensors["shift_labels"], tensors["loss_weights"]
            targets = labels.masked_fill((labels == NO_TARGET) | (weights == 0), 0)
            _check_ids(chunk, "id", tensors["input_ids"], self._parts.vocabulary)
            _check_ids(chunk, "target", targets, self._parts.head.weight.shape[0])


def _check_positions(chunk: Chunk, num_positions: int | None) -> None:
    for segment in chunk.segments:
        stop = segment.start + segment.length
        if num_positions is not None and stop > num_positions:
            raise SourceError(
                f"sample {segment.sample} has {stop} tokens or more, and the model has learned positions for "
                f"{num_positions}; leave longer samples out, or divide them"
            )


def _check_ids(chunk: Chunk, what: str, ids: Tensor, vocabulary: int) -> None:
    wrong = ((ids < 0) | (ids >= vocabulary)).nonzero()
    if len(wrong):
        at = int(wrong[0, 1])
        segment = next(s for s in chunk.segments if s.offset <= at < s.offset + s.length)
        raise SourceError(
            f"sample {segment.sample}, token {segment.start + at - segment.offset}: {what} {int(ids[0, at])} is "
            f"outside the model's vocabulary of {vocabulary}; the data was made with another tokenizer"
        )
