"""Real experts on two ranks without shaped links: our layer beside transformers' block and DeepSpeed's layer.

    python -m benchmarks.moe_peers RANK FOLDER OPTIONS        (started by benchmarks.moe)

All have the same weights and tokens; their outputs are compared before they are timed. A step is forward, backward, and
what makes gradients those of all tokens: what every rank holds whole is averaged between the ranks (transformers' block
under data parallelism; of ours and DeepSpeed's the gate, as their experts have sums already). Also shown, though it
does less: transformers' block without that.

Ways take turns, in an order drawn anew every round, for the machine to be as fast for each. A turn has two steps, and
both are timed: the first one finds the caches full of another way's code and weights, the second one has them as its
own; in a whole model's training, with attention in between, they are neither. A claim is about the worse of both.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.ranks import start_rank

DEADLINE_S = 1200
EXPERTS, TOP_K = 8, 2
WORKS = ((512, 256, 512), (1024, 256, 1024), (2048, 512, 1024))
"""Tokens a rank, model width, experts' inner width."""
ROUNDS = (160, 60, 20)
"""Of each work, about as long: runs of 30 rounds of the smallest one differ by 5%."""

ONE_RANK = "transformers, one rank's gradients"
STEPS = ("first", "second")
"""Of a turn."""

Step = Callable[[], torch.Tensor]


def run_real(*, quick: bool) -> list[dict[str, Any]]:
    """Run the two ranks; return their rows."""
    with tempfile.TemporaryDirectory(prefix="moe-real-") as folder:
        command = [sys.executable, "-m", "benchmarks.moe_peers"]
        environment = {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1"}
        options = json.dumps({"quick": quick})
        ranks = [start_rank([*command, str(rank), folder, options], environment) for rank in range(2)]
        try:
            codes = [rank.wait(DEADLINE_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise RuntimeError(f"ranks of the real experts ended with {codes}")
        return json.loads((Path(folder) / "rows.json").read_text())


class Weights:
    """One layer's weights and this rank's tokens, from which every way is built."""

    def __init__(self, tokens: int, width: int, inner: int, rank: int) -> None:
        torch.manual_seed(7)
        scale = width**-0.5
        self.router_ED = torch.randn(EXPERTS, width) * scale
        self.gate_up_EID = torch.randn(EXPERTS, 2 * inner, width) * scale
        self.down_EDI = torch.randn(EXPERTS, width, inner) * inner**-0.5
        torch.manual_seed(100 + rank)
        self.x_TD = torch.randn(tokens, width)
        self.grad_TD = torch.randn(tokens, width)
        self.width, self.inner = width, inner


def ours(weights: Weights, rank: int) -> tuple[Any, Step]:
    """Our layer with the experts spread over the ranks."""
    from moe.config import MoeConfig
    from moe.experts import StackedExperts
    from moe.gates.topk import SoftmaxGate
    from moe.lanes import make_lanes
    from moe.layer import MoELayer

    lanes = make_lanes(dist.group.WORLD, None, MoeConfig(timeout_s=120))
    own = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
    gate = SoftmaxGate(weights.width, EXPERTS, TOP_K)
    with torch.no_grad():
        next(gate.parameters()).copy_(weights.router_ED)
    experts = StackedExperts(weights.gate_up_EID[own].clone(), weights.down_EDI[own].clone())
    layer = MoELayer(gate, experts, lanes=lanes)
    return layer, lambda: layer(x_of(weights)).hidden


def transformers_block(weights: Weights) -> tuple[nn.Module, Step]:
    """The block of transformers' Mixtral, every rank with all experts, in its default implementation."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=weights.width,
        intermediate_size=weights.inner,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = "grouped_mm"
    block: Any = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(weights.gate_up_EID)
        block.experts.down_proj.copy_(weights.down_EDI)
    return block, lambda: block(x_of(weights)[None])[0]


class GatedMlp(nn.Module):
    """One expert as DeepSpeed takes it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[N, D]`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def deepspeed_layer(weights: Weights, rank: int) -> tuple[Any, Step]:
    """DeepSpeed's layer with the experts spread over the ranks, no token dropped."""
    with quiet():
        import deepspeed
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        layer: Any = MoE(
            weights.width,
            GatedMlp(weights.width, weights.inner),
            num_experts=EXPERTS,
            ep_size=2,
            k=TOP_K,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(weights.router_ED)
        for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(weights.gate_up_EID[rank * EXPERTS // 2 + i])
            expert.down.weight.copy_(weights.down_EDI[rank * EXPERTS // 2 + i])
    return layer, lambda: layer(x_of(weights))[0]


def x_of(weights: Weights) -> torch.Tensor:
    """Return the tokens, as something gradients go to."""
    return weights.x_TD.clone().requires_grad_()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what others print off our table."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def whole(module: Any) -> list[nn.Parameter]:
    """Return the parameters of what every rank holds whole."""
    return list(module.parameters())


def step(module: nn.Module, forward: Step, weights: Weights, averaged: Sequence[nn.Parameter]) -> float:
    """Run forward and backward once, and average gradients; return the seconds of the slower rank."""
    module.zero_grad()
    dist.barrier()
    began = time.perf_counter()
    forward().backward(weights.grad_TD)
    for p in averaged:
        if p.grad is not None:
            dist.all_reduce(p.grad)
    took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(work: Sequence[int], rank: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each way of one work."""
    tokens, width, inner = work
    weights = Weights(tokens, width, inner, rank)
    layer, forward = ours(weights, rank)
    ways: dict[str, tuple[nn.Module, Step, list[nn.Parameter]]] = {"ours": (layer, forward, whole(layer.gate))}
    block, forward = transformers_block(weights)
    ways["transformers, gradients averaged"] = (block, forward, whole(block))
    ways[ONE_RANK] = (block, forward, [])
    missing = {}
    try:
        layer, forward = deepspeed_layer(weights, rank)
        ways["DeepSpeed"] = (layer, forward, whole(layer.deepspeed_moe.gate))
    except Exception as error:  # noqa: BLE001 (whatever a peer cannot do here, the table says)
        missing["DeepSpeed"] = f"does not run here: {type(error).__name__}: {str(error)[:80]}"
    want = ways["ours"][1]().detach()
    notes = {}
    for name, (module, forward, averaged) in ways.items():
        error = (forward().detach() - want).abs().max().item()
        notes[name] = f"output off by {error:.1e}"
        step(module, forward, weights, averaged)
    times: dict[tuple[str, str], list[float]] = {(name, which): [] for name in ways for which in STEPS}
    draw = random.Random(7)  # alike on both ranks
    for _ in range(rounds):
        for name in draw.sample(list(ways), len(ways)):
            module, forward, averaged = ways[name]
            for which in STEPS:
                times[name, which].append(step(module, forward, weights, averaged))
    title = f"{tokens} tokens a rank, width {width}, {EXPERTS} experts of {inner}, top {TOP_K}"
    rows = [
        {
            "part": "real",
            "work": title,
            "way": name,
            "step": which,
            "seconds": median(values),
            "speedup": median(values) / median(times["ours", which]) if name != "ours" else None,
            "rounds": _middle(v / own for v, own in zip(values, times["ours", which], strict=True)),
            "same_work": name != ONE_RANK,
            "note": notes[name],
        }
        for (name, which), values in times.items()
    ]
    gone = [
        {"part": "real", "work": title, "way": name, "step": "-", "seconds": None, "speedup": None, "rounds": None,
         "note": note}
        for name, note in missing.items()
    ]  # fmt: skip
    return rows + gone


def _middle(ratios: Iterable[float]) -> list[float]:
    """Return the first and the last of the middle eight tenths."""
    return [float(value) for value in np.quantile(list(ratios), (0.1, 0.9))]


def main() -> None:
    """Join the world of two, measure, and let rank 0 write the rows."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    # DeepSpeed reads these, also when the world is there already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    quick = options["quick"]
    works = [(WORKS[0], 5)] if quick else list(zip(WORKS, ROUNDS, strict=True))
    rows = [row for work, rounds in works for row in measure(work, rank, rounds)]
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
