"""What a Trainer iterates instead of batches, and what its checkpoints say of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from chunkflow.errors import ChunkflowError
from chunkflow.loader import ChunkLoader
from chunkflow.records import StepBatch


class Steps(IterableDataset[StepBatch]):
    """One epoch of optimizer steps at a time."""

    def __init__(self, loader: ChunkLoader, *, drop_last: bool = False) -> None:
        """With `drop_last`, a step of fewer samples than the others is left out of each epoch."""
        self.loader = loader
        self._epoch, self._drop_last = 0, drop_last
        if len(self) == 0:
            raise ChunkflowError(
                f"dataloader_drop_last leaves no step: there are {self.num_samples} samples, and a step has "
                f"{loader.global_batch} (per_device_train_batch_size times the number of ranks); lower it"
            )

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        self._epoch = epoch

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return len(self.loader.source)

    def __len__(self) -> int:
        return self.num_samples // self.loader.global_batch if self._drop_last else self.loader.steps_per_epoch

    def __iter__(self) -> Iterator[StepBatch]:
        state = {**self.loader.state_dict(), "epoch": self._epoch, "step": 0}
        self.loader.load_state_dict(state)
        for _, batch in zip(range(len(self)), self.loader, strict=False):
            yield batch


class StepLoader(DataLoader[StepBatch]):
    """What a trainer iterates: `Steps`, unbatched."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(steps, batch_size=None)

    @property
    def steps(self) -> Steps:
        """What it iterates."""
        assert isinstance(self.dataset, Steps)
        return self.dataset

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        self.steps.set_epoch(epoch)


class ChunkPlan(TrainerCallback, ExportableState):
    """Keeps what the steps are planned from in the trainer's state, and so in every checkpoint, whoever writes it."""

    def __init__(self) -> None:
        self.plan: dict[str, Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the plan to a state that comes from a checkpoint without one."""
        noted: Any = state.stateful_callbacks  # a dict by now, whatever its annotation says
        noted.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        """Return what the trainer writes; see `ExportableState`."""
        return {"args": {}, "attributes": {"plan": self.plan}}

    @classmethod
    def saved_in(cls, checkpoint: str) -> dict[str, Any] | None:
        """Return the plan in a checkpoint's folder; None where it was not trained in chunks."""
        noted = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text()).get("stateful_callbacks") or {}
        return noted[cls.__name__]["attributes"]["plan"] if cls.__name__ in noted else None
