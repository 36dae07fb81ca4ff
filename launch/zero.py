"""DeepSpeed's ZeRO stages as the engine of a job: its loader, chunks and checkpoints are ours, sharding is DeepSpeed's.

In bf16 DeepSpeed keeps the model in bf16 and the weights that it steps in fp32; it clips gradients itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from chunkflow import ChunkRunner, StepBatch
from chunkflow.fit import OnOperation
from launch.config import FinetuneConfig
from launch.env import prepare_deepspeed
from launch.errors import ConfigError
from launch.mesh import limited_groups
from launch.optimizer import build_optimizer
from launch.partial import WholeModel
from launch.zero_state import ZeroState


class ZeroOptimizer:
    """What a job steps, in the place of a torch optimizer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The settings that the next step reads."""
        return self._engine.optimizer.param_groups

    def step(self) -> None:
        """Clip and step. Every rank calls."""
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left: the step took the gradients."""


class ZeroRunner:
    """Runs a job's steps in a DeepSpeed engine.

    Every rank makes one, with the same whole model, and calls every method. Raises ConfigError where DeepSpeed is not
    installed.
    """

    def __init__(
        self, model: PreTrainedModel, config: FinetuneConfig, group: dist.ProcessGroup, watch: OnOperation | None = None
    ) -> None:
        self.whole, self._stage, self._group = WholeModel.of(model), int(config.engine[-1]), group
        optimizer = build_optimizer(model, config.optimizer)
        self._engine = _engine(model, optimizer, config, self._stage)
        self._runner = ChunkRunner(self._engine, retain=config.chunks.retain, seed=config.run.seed)
        self._runner.on_operation = watch
        self.model: PreTrainedModel = self._engine.module
        self.num_positions, self.evaluate = self._runner.num_positions, self._runner.evaluate
        self.optimizer = ZeroOptimizer(self._engine)
        self.state = ZeroState(self._engine, self.whole, group)

    @property
    def description(self) -> str:
        """Return what is sharded, in words."""
        what = ("moments", "moments and gradients", "moments, gradients and weights")[self._stage - 1]
        return f"DeepSpeed ZeRO-{self._stage}: {what} sharded over {dist.get_world_size(self._group)} ranks"

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Run one step; return its mean loss. Every rank calls; `optimizer.step` has to follow."""
        return self._runner.forward_backward(batch)

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole gradient, as DeepSpeed will clip by it. Every rank calls."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            norms = [torch.as_tensor(norm).double().reshape(()) for norm in optimizer._get_norm_groups()]
        else:
            norms = [torch.as_tensor(optimizer.scaled_global_norm()).double().reshape(())]
        parts = torch.stack(norms)
        # DeepSpeed says -1 of a norm that is not finite.
        return torch.where((parts < 0).any(), torch.nan, torch.linalg.vector_norm(parts))

    @torch.no_grad()
    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the whole model on rank 0, filled into the one that `build` makes there. Every rank calls."""
        model = build() if dist.get_rank() == 0 else None
        target = {} if model is None else model.state_dict()
        mine = {part.name: part for part in self.state.parts}
        for name, parameter in self.model.named_parameters():
            part, shape = mine.get(name), self.whole.shapes[name]
            if not parameter.requires_grad and not hasattr(parameter, "ds_id"):
                value = parameter.detach()
            else:
                value = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
                if part is not None:
                    value.view(-1)[part.held.start : part.held.stop] = part.of(part.flat)
                dist.reduce(value, 0, group=self._group)
            if name in target:
                target[name].copy_(value)
        return model


def _engine(model: PreTrainedModel, optimizer: Optimizer, config: FinetuneConfig, stage: int) -> Any:
    prepare_deepspeed(model.device)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine is {config.engine}, and deepspeed cannot be imported: pip install 'longrail[deepspeed]' ({error})"
        ) from error
    if model.device.type == "cpu":  # gloo alone: its operator for shared memory would be compiled for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    width = model.config.get_text_config().hidden_size
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # Vectors stay gathered in stage 3, as transformers' own integration has it.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10 * width},
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.precision == "bf16"},
    }
    with limited_groups(config.patience_s):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
