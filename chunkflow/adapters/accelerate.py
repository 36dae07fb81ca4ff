"""Accelerate: chunks under `Accelerator.prepare`, with its mixed precision, DDP, FSDP2 or DeepSpeed.

model, optimizer = accelerator.prepare(model, optimizer)       # not the loader: ChunkLoader knows its rank
runner = AcceleratedRunner(accelerator, model, retain=1)
loss = runner.forward_backward(batch)                          # instead of accelerator.backward(loss)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from chunkflow.errors import ChunkflowError
from chunkflow.records import StepBatch
from chunkflow.runner import ChunkRunner

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(f"{__name__} needs Accelerate: pip install 'longrail[accelerate]' ({error})") from error


class AcceleratedRunner:
    """A `ChunkRunner` for a model that `accelerator.prepare` returned; arguments as there.

    Raises ChunkflowError for settings that would change gradients or step the optimizer at the wrong time.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, **settings: Any) -> None:
        if accelerator.gradient_accumulation_steps != 1:
            raise ChunkflowError(
                f"Accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; set it to 1: "
                "chunks are accumulated by the runner, and every batch of a ChunkLoader is one optimizer step"
            )
        if accelerator.scaler is not None:
            raise ChunkflowError(
                "mixed precision fp16 scales the loss, and chunks add up unscaled gradients; use bf16, or "
                "no mixed precision"
            )
        self._accelerator = accelerator
        self._model: Any = model
        with accelerator.autocast():
            self.runner = ChunkRunner(model, **settings)

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """See `ChunkRunner.forward_backward`; under Accelerate's autocast."""
        with self._accelerator.autocast():
            loss = self.runner.forward_backward(batch)
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._model.step()  # as accelerator.backward does, since its optimizer.step() is nothing then
        return loss

    def evaluate(self, batch: StepBatch) -> Tensor:
        """See `ChunkRunner.evaluate`; under Accelerate's autocast."""
        with self._accelerator.autocast():
            return self.runner.evaluate(batch)
