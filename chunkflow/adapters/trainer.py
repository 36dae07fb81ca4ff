"""transformers' `Trainer` in chunks: a mixin. Everything else of the trainer stays: logs, callbacks, saves, resume.

    class ChunkTrainer(ChunkMixin, Trainer):
        chunks = PlannerConfig(chunk_tokens=8192)
    trainer = ChunkTrainer(model=model, args=args, train_dataset=tokenized, data_collator=collator)

`per_device_train_batch_size` is what it was: samples in a step = that times the number of ranks. Long samples are not
cut, and their gradients are exact. A checkpoint holds what its steps were planned from: a resume with other data or
another global batch, whose steps would be others, is refused.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from chunkflow.adapters.accelerate import AcceleratedRunner
from chunkflow.adapters.rows import CollatedRows, require_rows
from chunkflow.adapters.trainer_settings import ignored, require_possible
from chunkflow.adapters.trainer_steps import ChunkPlan, StepLoader, Steps
from chunkflow.config import PlannerConfig
from chunkflow.errors import ChunkflowError
from chunkflow.loader import ChunkLoader
from chunkflow.positions import beyond_positions
from chunkflow.sources import Source, is_source

_log = logging.getLogger("chunkflow")
_EPOCHS = 2**20
"""More than any run has; the trainer counts them."""


class ChunkMixin(Trainer):
    """Put before `Trainer`, or a subclass of it, among the bases."""

    chunks: PlannerConfig
    """How sequences become chunks; set it in the class, or on the trainer before `train`."""

    cross_entropy_of: tuple[type, ...] = (Trainer,)
    """Whose `compute_loss` is known to be the mean cross entropy of the targets."""

    _accelerated: tuple[Any, type, AcceleratedRunner] | None = None
    """The last model that was run, its class, and its runner."""
    _resumes: str | None = None
    """The checkpoint that `train` goes on from."""

    def __init__(self, *args: Any, **others: Any) -> None:
        dataset = others.get("train_dataset")
        if dataset is not None and not is_source(dataset):  # before it is prepared
            require_rows(dataset)
        super().__init__(*args, **others)
        self._require_possible()
        self.add_callback(ChunkPlan())
        self._reported: set[str] = set()

    def source(self, dataset: Any) -> Source:
        """Return a data set of the trainer as samples, each with the labels that the trainer's collator gives it."""
        if is_source(dataset):
            return dataset
        return CollatedRows(dataset, self._get_collator_with_removed_columns(self.data_collator))

    def get_train_dataloader(self) -> StepLoader:
        """Return the steps of an epoch, planned and loaded ahead."""
        args = self.args
        self._require_possible()
        loader = self._loader(self.train_dataset, args.train_batch_size * args.world_size, epochs=_EPOCHS)
        found = StepLoader(Steps(loader, drop_last=args.dataloader_drop_last))
        self._same_steps(found.steps)
        beyond = beyond_positions(loader.source.lengths, self.model)
        if beyond is not None:
            self._tell(beyond)
        without_effect = ignored(args)
        if without_effect:
            self._tell(f"{type(self).__name__} ignores {', '.join(without_effect)}")
        return found

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """Return the evaluation's steps."""
        self._require_no_predictions()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            assert isinstance(self.eval_dataset, dict)
            dataset = self.eval_dataset[dataset]
        return StepLoader(Steps(self._loader(dataset, self.args.eval_batch_size * self.args.world_size, epochs=1)))

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: str | None = None, **others: Any) -> Any:
        self._resumes = resume_from_checkpoint
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **others)

    def _same_steps(self, steps: Steps) -> None:
        """Raise ChunkflowError, naming what differs, where the checkpoint's steps were planned from something else."""
        noted = next(one for one in self.callback_handler.callbacks if isinstance(one, ChunkPlan))
        noted.plan = {**steps.loader.state_dict(), "steps_per_epoch": len(steps)}
        if self._resumes is None:
            return
        saved = ChunkPlan.saved_in(self._resumes)
        if saved is None:
            self._tell(
                f"{self._resumes} was not trained in chunks, which draw samples in another order: of the epoch it "
                "stands in, some are trained a second time and some not at all; every later epoch is whole"
            )
            return
        try:
            steps.loader.load_state_dict({**saved, "epoch": 0, "step": 0})
            if saved["steps_per_epoch"] != len(steps):
                raise ChunkflowError(
                    f"an epoch had {saved['steps_per_epoch']} steps and has {len(steps)}: set dataloader_drop_last as "
                    "it was"
                )
        except ChunkflowError as error:
            raise ChunkflowError(
                f"{self._resumes}: {error} (a step has per_device_train_batch_size times the number of ranks samples)"
            ) from error

    def _require_possible(self) -> None:
        """Raise ChunkflowError, naming it, for what chunks cannot do: when it is made, and when it trains."""
        require_possible(self.args)
        self._require_cross_entropy()
        self._require_no_predictions()

    def _require_cross_entropy(self) -> None:
        """Raise ChunkflowError, naming it, where the trainer's loss is not the cross entropy of each target."""
        owner = next(kind for kind in type(self).__mro__ if "compute_loss" in vars(kind))
        others = {
            f"{owner.__name__}.compute_loss": owner not in self.cross_entropy_of,
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "neftune_noise_alpha": self.args.neftune_noise_alpha is not None,
        }
        found = [name for name, is_set in others.items() if is_set]
        if found:
            raise ChunkflowError(
                f"{', '.join(found)} makes the loss another one than the cross entropy of each target (losses over "
                "whole sequences or pairs of them, such as DPO, are none): it cannot be trained exactly in chunks; "
                "use a trainer without it"
            )

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ChunkflowError: there are no predictions."""
        raise ChunkflowError(
            "predict gives logits, and chunks keep none; evaluate gives the loss, a plain Trainer of the model the rest"
        )

    def _require_no_predictions(self) -> None:
        """Raise ChunkflowError, naming it, where an evaluation is asked for more than the loss."""
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name, None) is not None:
                raise ChunkflowError(
                    f"{name} takes predictions, and chunks keep none: an evaluation gives the loss; leave it out, and "
                    "find other metrics with a plain Trainer of the same model"
                )

    def _tell(self, line: str) -> None:
        """Warn, on one rank."""
        if self.is_world_process_zero():
            _log.warning(line)

    def _loader(self, dataset: Any, global_batch: int, *, epochs: int) -> ChunkLoader:
        # Several ranks: the loader takes its place from the default group, and so compares data and settings first.
        place: dict[str, Any] = {"rank": 0, "world_size": 1} if self.args.world_size == 1 else {}
        source = self.source(dataset)

        def report(text: str) -> None:  # an evaluation comes again and again
            if source.manifest not in self._reported:
                print(text)
            self._reported.add(source.manifest)

        return ChunkLoader(
            source,
            chunk_tokens=self.chunks.chunk_tokens,
            retain=self.chunks.retain,
            pair_cost=self.chunks.pair_cost,
            global_batch=global_batch,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            epochs=epochs,
            report=report,
            **place,
        )

    def num_examples(self, dataloader: Any) -> int:
        """Return the samples of a data set, of which a step holds several."""
        dataset = dataloader.dataset
        return dataset.num_samples if isinstance(dataset, Steps) else super().num_examples(dataloader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Return the next step; its targets are counted in it."""
        return [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)], None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Train one step in chunks; return its mean loss over all ranks."""
        model.train()
        return self._runner(model).forward_backward(inputs).to(self.args.device, torch.float32)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 6 * parameters * tokens of a step."""
        assert self.model is not None
        return 6 * inputs.num_tokens * sum(p.numel() for p in self.model.parameters())

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count the tokens of a step over all ranks; none of them is padding."""
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(inputs.num_tokens, device=self.args.device)
            of_ranks: Any = self.accelerator.gather(tokens)
            self.state.num_input_tokens_seen += int(of_ranks.sum())

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Return the mean loss over all targets of a data set; predictions are not kept."""
        model: Any = self.model_wrapped
        if not self.is_in_train:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        runner = self._runner(model)
        steps = [(float(runner.evaluate(batch)) * batch.denominator, batch.denominator) for batch in dataloader]
        loss = sum(total for total, _ in steps) / sum(count for _, count in steps)
        return EvalLoopOutput(np.empty(0), None, {f"{metric_key_prefix}_loss": loss}, self.num_examples(dataloader))

    def _runner(self, model: Any) -> AcceleratedRunner:
        """Return the runner of a model: what was evaluated may be wrapped or sharded (in place) to be trained."""
        if self._accelerated is None or self._accelerated[0] is not model or self._accelerated[1] is not type(model):
            runner = AcceleratedRunner(self.accelerator, model, retain=self.chunks.retain)
            self._accelerated = (model, type(model), runner)
        return self._accelerated[2]
