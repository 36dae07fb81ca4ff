"""Experts in bf16 over ranks, beside transformers' own model in bf16 in one process; both against fp64."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.tensor import DTensor

import moe
from chunkflow.reference import float64_throughout
from launch.config import ChunksConfig, FinetuneConfig, ModelConfig, RunConfig
from launch.runners import make_runner
from moe.config import ExpertsConfig
from moe.hooks import Hooks
from moe.state import to_global
from tests.moe_jobs import loader_of, place_of
from tests.moe_models import tiny_moe
from tests.spawn import run_ranks


def gradients(info, folder, ep, esp, precision):
    """Loss and gradient of one step, and the dtypes of the rows that travel. `ep` None: transformers' own experts."""
    model = tiny_moe("mixtral", dtype=torch.float64 if precision == "fp64" else torch.float32).train()
    model.set_experts_implementation("eager")  # grouped_mm would ignore autocast
    wanted = ExpertsConfig(ep=ep, esp=esp, timeout_s=30, slice_bytes=1024, chunks=2) if ep else ExpertsConfig()
    config = FinetuneConfig(
        run=RunConfig(folder=folder),
        model=ModelConfig(precision="bf16" if precision == "bf16" else "fp32"),
        chunks=ChunksConfig(chunk_tokens=16, retain=2),
        moe=wanted,
    )
    runner, seen = make_runner(model, config, place_of(info, ep or 1, esp)), set()
    for layer in moe.expert_layers(model).values():
        layer.runner.hooks = Watching(seen)
    exact = float64_throughout() if precision == "fp64" else nullcontext()
    with exact, loader_of(info.rank, info.world_size) as loader:
        batch = next(iter(loader))
        loss = float(runner.forward_backward(batch))
        assert abs(float(runner.evaluate(batch)) - loss) < 0.05 * loss
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole = to_global(model, grads) if ep else grads
    assert {grad.dtype for grad in grads.values()} == {model.dtype}
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in whole.items()}
    return loss, {name: x.double() for name, x in whole.items()}, seen


class Watching(Hooks):
    def __init__(self, seen):
        self.seen = seen

    def before_dispatch(self, rows_ND, info):
        self.seen.add(rows_ND.dtype)
        return rows_ND


def distance(a, b):
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in b))


@pytest.mark.parametrize(("ranks", "ep", "esp"), [(2, 2, 1), (2, 1, 2)])
def test_bf16_is_as_near_the_exact_gradient_as_one_process_in_bf16(tmp_path, ranks, ep, esp):
    """Products round to 8 bits wherever they run; weights and gradients stay fp32, and half the bytes travel."""
    folder = str(tmp_path)
    true_loss, true, _ = run_ranks(gradients, 1, folder, None, 1, "fp64")[0]
    one_loss, one, _ = run_ranks(gradients, 1, folder, None, 1, "bf16")[0]
    found = run_ranks(gradients, ranks, folder, ep, esp, "bf16")
    size = math.sqrt(sum(float(x.square().sum()) for x in true.values()))
    rounding = distance(one, true)
    assert 1e-4 * size < rounding < 0.2 * size  # a token may go to another expert, too
    for loss, grads, seen in found:
        assert seen == {torch.bfloat16}
        assert grads.keys() == true.keys()
        assert loss == pytest.approx(one_loss, rel=2e-3)
        assert loss == pytest.approx(true_loss, rel=5e-3)
        assert distance(grads, true) < 1.5 * rounding
        assert distance(grads, one) < 1.5 * rounding
