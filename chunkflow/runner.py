"""`ChunkRunner`: the loss call of a training loop, over chunks, with the gradients of whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from chunkflow.adapters import unwrap
from chunkflow.agree import place_noted, require_agreement, require_same_step
from chunkflow.attention.interface import attention_of
from chunkflow.autocast import without_weight_cache
from chunkflow.engine import Engine, Step
from chunkflow.errors import ChunkflowError, SourceError
from chunkflow.executor import StepExecutor
from chunkflow.fit import OnOperation, timed
from chunkflow.parts import Runnable
from chunkflow.program import operations
from chunkflow.recompute import LayerCheckpoints
from chunkflow.records import Chunk, StepBatch
from chunkflow.sources import NO_TARGET
from chunkflow.support import require_exact
from chunkflow.world import resolve_group


class ChunkRunner:
    """Trains the chunks of one step with exact gradients.

    `model` is a transformers causal LM: plain, or wrapped in DDP (whose own reduction is not used), FSDP2's
    `fully_shard`, a DeepSpeed engine, or PEFT's LoRA. `retain` is how many chunks of a long sequence keep their
    activations: memory is set by `chunk_tokens * retain`. `group` are the ranks that share the global batch: by default
    the wrapper's, or the default process group where there is one; `SINGLE` is this process alone. `offload` keeps keys
    and values of long sequences in the host's memory, for models on an accelerator. `checkpoint_layers` keeps of each
    decoder layer only its input, and runs it a second time in backward; transformers' own
    `activation_checkpointing_enable` does the same in train mode. `engine`, given the group, returns how ranks work
    together where no wrapper says it: `chunkflow.engine.InStep` for layers that ask other ranks.

    Made on every rank; raises PlanError when their settings differ. Raises UnsupportedModelError, naming the layer and
    the reason, for a model that could not be trained exactly; it finds out by running a few tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        retain: int = 1,
        group: dist.ProcessGroup | str | None = None,
        seed: int = 0,
        offload: bool = False,
        checkpoint_layers: bool = False,
        engine: Callable[[dist.ProcessGroup | None], Engine] | None = None,
    ) -> None:
        wrapped = unwrap(model, group)
        ranks = resolve_group(wrapped.group)
        made = (engine or wrapped.engine)(ranks)
        parts = require_exact(wrapped.model, made)
        checkpoints = LayerCheckpoints(parts.layers.values() if checkpoint_layers else ())
        self._begin(parts, made, ranks, checkpoints, retain=retain, seed=seed, offload=offload)

    def _begin(
        self, parts: Runnable, engine: Engine, group: dist.ProcessGroup | None, checkpoints: LayerCheckpoints, *,
        retain: int, seed: int, offload: bool,
    ) -> None:  # fmt: skip
        if group is not None:
            settings = {"retain": retain, "seed": seed, "offload": offload, "trained parameters": _trained(parts)}
            require_agreement(group, settings, of="runners")
        if retain < 1:
            raise ChunkflowError(f"retain is {retain}; it must be at least 1, the chunk that is trained now")
        self._group, self._engine, self._parts = group, engine, parts
        self._retain, self._seed, self._offload, self._checkpoints = retain, seed, offload, checkpoints
        self.on_operation: OnOperation | None = None
        """Called with every op of training, its chunk and the seconds it took."""

    @property
    def device(self) -> torch.device:
        """Where the model is, and what its ranks exchange."""
        return self._parts.device

    @property
    def num_positions(self) -> int | None:
        """Tokens that the longest sequence may have, where the model has learned its positions; None for no limit."""
        return self._parts.num_positions

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Run one step's forward and backward; return the step's mean loss over all ranks, fp64, 0-d, detached.

        Every rank of the group calls once a step. Afterwards `.grad` of every parameter holds the gradient of that loss
        (added to what was there), the same on every rank, or the rank's shard of it; call `optimizer.step()` next.
        Activations of at most `retain` chunks are alive at a time. Train or eval mode is the caller's.

        Raises, on every rank and before anything runs, when a rank cannot run its chunks or is at another step.
        """
        with place_noted(self._group, batch.step):
            return self._train(batch)

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Return the step's mean loss over all ranks, fp64, without gradients. Every rank of the group calls."""
        with place_noted(self._group, batch.step):
            return self._score(batch)

    def _train(self, batch: StepBatch) -> Tensor:
        steps = self._prepared(
            batch, lambda: self._engine.operations(batch.program, list(operations(batch.chunks, self._retain)))
        )
        parameters = [p for p in self._parts.model.parameters() if p.requires_grad]
        report = self.on_operation
        watch = None if report is None else partial(timed, chunks=batch.chunks, on_operation=report)
        with (
            attention_of(self._parts.model),
            without_weight_cache(self._parts.device),
            self._engine.training(parameters),
            self._checkpoints.on(),
        ):
            loss = self._executor(batch).train(steps, denominator=batch.denominator, watch=watch)
        return self._over_ranks(loss)

    def _score(self, batch: StepBatch) -> Tensor:
        steps = self._prepared(batch, lambda: self._engine.scoring_operations(batch.program, len(batch.chunks)))
        with attention_of(self._parts.model), without_weight_cache(self._parts.device), self._engine.scoring():
            return self._over_ranks(self._executor(batch).score(steps, denominator=batch.denominator))

    def _prepared(self, batch: StepBatch, plan: Callable[[], Sequence[Step]]) -> Sequence[Step]:
        """Check a batch and plan it; on every rank of the group, or on none."""
        refusal, steps = None, ()
        try:
            self._check_tokens(batch)
            steps = plan()
        except ChunkflowError as error:
            refusal = error
        if self._group is not None:
            place = {"step": batch.step, "denominator": batch.denominator, "digest": batch.digest}
            require_same_step(self._group, self._parts.device, **place, failed=refusal is not None)
        if refusal is not None:
            raise refusal
        return steps

    def _executor(self, batch: StepBatch) -> StepExecutor:
        seed = self._seed * 1_000_003 + batch.step
        return StepExecutor(self._parts, batch.chunks, dropout_seed=seed, offload=self._offload)

    def _over_ranks(self, loss: Tensor) -> Tensor:
        if self._group is None:
            return loss
        loss = loss.to(self._parts.device)
        dist.all_reduce(loss, group=self._group)
        return loss.cpu()

    def _check_tokens(self, batch: StepBatch) -> None:
        for chunk in batch.chunks:
            _check_positions(chunk, self._parts.num_positions)
            tensors = chunk.tensors()
            labels, weights = tensors["shift_labels"], tensors["loss_weights"]
            targets = labels.masked_fill((labels == NO_TARGET) | (weights == 0), 0)
            _check_ids(chunk, "id", tensors["input_ids"], self._parts.vocabulary)
            _check_ids(chunk, "target", targets, self._parts.num_targets)


def _trained(parts: Runnable) -> str:
    """Return how many parameters are trained, and a digest of their names."""
    names = [name for name, parameter in parts.model.named_parameters() if parameter.requires_grad]
    return f"{len(names)} ({xxhash.xxh3_64_hexdigest(' '.join(names).encode())})"


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
