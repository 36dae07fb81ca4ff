"""What the checkpoint benchmark saves: states of a known size, and the training step that goes on meanwhile.

Every rank owns half of the parameters and steps those alone, with their moments: as in ZeRO-1, no tensor is on two
ranks, and no way of saving has to find that out. Gradients are not exchanged, so that no step waits for the loopback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

SMALL_ELEMENTS = 64  # fp32: 256 bytes


@dataclass
class Work:
    """One rank's state and step."""

    title: str
    tensors: dict[str, torch.Tensor]
    """What this rank saves, by global name."""
    compute: Callable[[], None]
    """Forward and backward."""
    optimizer: torch.optim.Optimizer | None = None

    @property
    def num_bytes(self) -> int:
        """Of this rank."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def step(self, fence: Callable[[], None]) -> float:
        """Train one step; `fence` is called before the update. Returns the seconds spent in it."""
        self.compute()
        began = time.perf_counter()
        fence()
        took = time.perf_counter() - began
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return took

    # A Stateful, for those who take one.

    restores_own_names: ClassVar[bool] = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors."""
        return dict(self.tensors)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take those of this rank."""
        for name, tensor in self.tensors.items():
            tensor.detach().copy_(state_dict[name])


def smollm(rank: int, world: int, *, tokens: int) -> Work:
    """SmolLM2-135M's shape with random weights, trained on `tokens` tokens a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(rank))

    def compute() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    title = f"SmolLM2-135M with AdamW, {tokens} tokens a step"
    return _trained(title, dict(model.named_parameters()), compute, rank, world)


def synthetic(rank: int, world: int, *, total_bytes: int) -> Work:
    """Large parameters without a model; the step multiplies matrices, about a second for 4 GB, and updates them all."""
    count, side = 40 * world, 4096
    rows = max(1, total_bytes // 3 // count // (4 * side))
    params = {f"layer.{i}.weight": nn.Parameter(torch.zeros(rows, side)) for i in range(count) if i % world == rank}
    for param in params.values():
        param.grad = torch.full_like(param, 1e-3)
    square, products = torch.randn(1024, 1024), max(2, round(6e-9 * total_bytes))

    def compute() -> None:
        for _ in range(products):
            torch.mm(square, square)

    title = f"synthetic with AdamW, {3 * 4 * rows * side * count / 1e9:.1f} GB"
    return _trained(title, params, compute, rank, world, owned=list(params))


def small(rank: int, world: int, *, count: int) -> Work:
    """Tensors of 256 bytes, half of them on each rank."""
    torch.manual_seed(rank)
    share = range(rank, count, world)
    tensors = {f"layer.{i // 100}.part.{i % 100}.value": torch.randn(SMALL_ELEMENTS) for i in share}
    return Work(f"{count:,} tensors of {4 * SMALL_ELEMENTS} bytes", tensors, lambda: None)


def _trained(
    title: str,
    params: dict[str, nn.Parameter],
    compute: Callable[[], None],
    rank: int,
    world: int,
    owned: list[str] | None = None,
) -> Work:
    mine = owned if owned is not None else _share(params, rank, world)
    optimizer = torch.optim.AdamW([params[name] for name in mine], lr=1e-4, fused=True)
    compute()
    optimizer.step()  # the moments are there from now on
    optimizer.zero_grad(set_to_none=False)
    tensors: dict[str, torch.Tensor] = {}
    for name in mine:
        tensors[f"model.{name}"] = params[name]
        tensors |= {f"optim.{name}.{slot}": value for slot, value in _slots(optimizer, params[name])}
    return Work(title, tensors, compute, optimizer)


def _slots(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    return iter(optimizer.state[param].items())


def _share(params: Mapping[str, nn.Parameter], rank: int, world: int) -> list[str]:
    """Return this rank's parameters: the largest first, each to whoever has least."""
    held, mine = [0] * world, []
    for name in sorted(params, key=lambda name: (-params[name].numel(), name)):
        least = held.index(min(held))
        held[least] += params[name].numel()
        if least == rank:
            mine.append(name)
    return mine
