"""DeepSpeed: the engine that `deepspeed.initialize` returned, ZeRO stage 1, 2 or 3.

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    runner = ChunkRunner(engine, retain=1)
    loss = runner.forward_backward(batch); engine.step()

DeepSpeed averages gradients over ranks and divides them by its accumulation steps; our loss is a sum over ranks that is
divided already. So it is multiplied by the ranks, and `scale_wrt_gas` is off. Where a step ends is said by hand:
`gradient_accumulation_steps` of the configuration has no effect.

Stages 1 and 2 keep whole parameters, so ranks run programs of their own and gradients are reduced once, at the end of
the step (`coalesce_grad_reduction`); until then stage 2 holds whole gradients too. Stage 3 gathers parameters in every
operation and scatters gradients in every backward, so all ranks run the common program, with dummies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from chunkflow.adapters import Wrapped, without_peft
from chunkflow.engine import Engine, Step, forward_as, own_forwards
from chunkflow.errors import ChunkflowError
from chunkflow.program import Operation, align


def unwrap_deepspeed(model: nn.Module, group: dist.ProcessGroup | str | None) -> Wrapped:
    """Look through a DeepSpeed engine; raise ChunkflowError for settings under which chunks would not be exact."""
    engine: Any = model
    _require_exact(engine)
    kind = Zero3 if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3) else Zero12
    ranks = engine.seq_data_parallel_group if group is None else group
    return Wrapped(without_peft(engine.module), ranks, lambda found: kind(engine, found))


class _Zero:
    """What the stages have in common."""

    in_place = False

    def __init__(self, engine: Any, group: dist.ProcessGroup | None) -> None:
        if group is None or dist.get_world_size(group) != dist.get_world_size(engine.seq_data_parallel_group):
            raise ChunkflowError(
                "the model is in a DeepSpeed engine and group is not the ranks that share it; leave group out"
            )
        self._engine = engine
        self._ranks = dist.get_world_size(group)
        self._trained_at: int | None = None

    def call(self, forward: Callable[..., Tensor], **inputs: Any) -> Tensor:
        """See `Engine.call`: as the engine's forward, whose hooks gather parameters and watch the backward."""
        with forward_as(self._engine.module, forward):
            return self._engine(**inputs)

    def scoring(self) -> AbstractContextManager[None]:
        """See `Engine.scoring`."""
        return nullcontext()

    def _begin_step(self) -> None:
        """Refuse a second step's gradients on top of the first's: DeepSpeed would overwrite or mix them."""
        if self._trained_at == self._engine.global_steps:
            raise ChunkflowError(
                f"step {self._trained_at} of the DeepSpeed engine was trained and engine.step() was not called since; "
                "call it after every forward_backward"
            )
        self._trained_at = self._engine.global_steps

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._ranks, scale_wrt_gas=False)


class Zero12(_Zero):
    """`Engine` of ZeRO stages 1 and 2."""

    def operations(self, program: str, own: Sequence[Operation]) -> Sequence[Step]:
        """See `Engine.operations`: this rank's own, and a dummy, so that a rank without chunks has gradients."""
        return [*own, ("F", None), ("B", None)]

    def scoring_operations(self, program: str, num_chunks: int) -> Sequence[Step]:
        """See `Engine.scoring_operations`."""
        return own_forwards(num_chunks)

    @contextmanager
    def training(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """See `Engine.training`."""
        self._begin_step()
        optimizer = self._engine.optimizer
        with self._engine.coalesce_grad_reduction():
            yield
            for parameter in parameters:
                if optimizer.get_gradient_for_reduction(parameter) is None:  # ranks reduce the same buckets
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.backward_epilogue()
        self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self._backward(loss)


class Zero3(_Zero):
    """`Engine` of ZeRO stage 3."""

    def operations(self, program: str, own: Sequence[Operation]) -> Sequence[Step]:
        """See `Engine.operations`: the common program."""
        return align(program, own)

    def scoring_operations(self, program: str, num_chunks: int) -> Sequence[Step]:
        """See `Engine.scoring_operations`: as many forwards as the program has backwards; no rank has more chunks."""
        return [*own_forwards(num_chunks), *[("f", None)] * (program.count("B") - num_chunks)]

    @contextmanager
    def training(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """See `Engine.training`."""
        self._begin_step()
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self._engine.set_gradient_accumulation_boundary(last)
        # Counted in forward otherwise: the second of two backwards in a row would replace the gradients of the first.
        self._engine.optimizer.clear_backward_seen_flag()
        self._backward(loss)


def _require_exact(engine: Any) -> None:
    if type(engine) is not DeepSpeedEngine:
        raise ChunkflowError(f"{type(engine).__name__} is not trained in chunks; give a plain DeepSpeedEngine")
    if type(engine.optimizer) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        raise ChunkflowError(
            f"DeepSpeed's optimizer is {type(engine.optimizer).__name__}; chunks train ZeRO stages 1, 2 and 3 with "
            "fp32 or bf16: set zero_optimization.stage, and at stage 1 in bf16 leave data_types.grad_accum_dtype out"
        )
    refused = {
        "fp16": engine.fp16_enabled(),
        "torch_autocast": engine.torch_autocast_enabled(),
        "compile.deepcompile": engine.is_deepcompile_enabled(),
        "sequence parallelism": _size(engine.seq_data_parallel_group) != _size(engine.data_parallel_group),
        "managed_gradient_accumulation: false": not engine.managed_gradient_accumulation(),
    }
    on = [name for name, is_on in refused.items() if is_on]
    if on:
        raise ChunkflowError(
            f"DeepSpeed is configured with {', '.join(on)}, under which chunks are not tested to be exact; turn it "
            "off, and use bf16 for mixed precision"
        )


def _size(group: Any) -> int:
    return dist.get_world_size(group)


_: tuple[Callable[..., Engine], ...] = (Zero12, Zero3)
"""Both are engines; said to the type checker."""
