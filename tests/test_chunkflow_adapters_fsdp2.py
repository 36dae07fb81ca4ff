"""FSDP2 on two ranks: the weights after three steps are those of the one-process run, fp64."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from chunkflow import SINGLE, ChunkflowError, ChunkRunner, UnsupportedModelError
from tests.chunk_steps import batches, evaluated, furthest, one_process, optimizer_of
from tests.spawn import run_ranks
from tests.tiny import tiny_model

EXACT = 1e-7  # norms and RoPE cast to fp32 inside, here as there


def sharded(name, apart, **changes):
    model = tiny_model(name, **changes)
    for layer in model.model.layers:
        fully_shard(layer)
    if apart:
        fully_shard(model.lm_head)
    return fully_shard(model)


def train(info, name, apart, changes):
    model = sharded(name, apart, **changes)
    runner, optimizer = ChunkRunner(model, retain=3), optimizer_of(model)
    losses, scored = [], []
    for batch in batches(info.rank, info.world_size):
        scored.append(float(runner.evaluate(batch)))
        losses.append(float(runner.forward_backward(batch)))
        assert all(isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return losses, scored, {n: p.detach().full_tensor() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "apart", "changes"),
    [("llama", False, {}), ("llama", True, {}), ("qwen3", False, {"tie_word_embeddings": True})],
    ids=["root", "head apart", "tied"],
)
def test_two_ranks_equal_one_process(name, apart, changes):
    losses, weights = one_process(name, **changes)
    for ours, scored, shards in run_ranks(train, 2, name, apart, changes):
        assert ours == pytest.approx(losses, rel=EXACT)
        assert scored == pytest.approx(losses, rel=EXACT)
        assert furthest(shards, weights) < EXACT


def train_bf16(info):
    model = tiny_model(dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    model = fully_shard(model, mp_policy=policy)
    runner, optimizer = ChunkRunner(model, retain=3), optimizer_of(model)
    losses = []
    for batch in batches(info.rank, info.world_size):
        losses.append(float(runner.forward_backward(batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_mixed_precision_stays_near_the_whole_run():
    losses, _ = one_process(dtype=torch.float32)
    for ours in run_ranks(train_bf16, 2):
        assert ours == pytest.approx(losses, rel=0.01)


def without_a_root(info):
    model = tiny_model()
    mesh = init_device_mesh("cpu", (info.world_size,))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
    with pytest.raises(UnsupportedModelError, match=r"output projection of Llama.* is sharded .* fully_shard"):
        ChunkRunner(model)
    shards = sharded("llama", False)
    with pytest.raises(ChunkflowError, match="sharded with FSDP2 and group is SINGLE"):
        ChunkRunner(shards, group=SINGLE)
    return isinstance(shards, FSDPModule)


def test_what_cannot_be_gathered_is_refused():
    assert run_ranks(without_a_root, 2) == [True, True]


def with_dtensors(info):
    """A weight that is a DTensor, replicated: its gradient is summed over the axes it is replicated on."""
    model = tiny_model()
    mesh = init_device_mesh("cpu", (info.world_size,))
    for layer in model.model.layers:
        layer.mlp.up_proj = Replicated(layer.mlp.up_proj, mesh)
    runner = ChunkRunner(model, retain=3)
    runner.forward_backward(batches(info.rank, info.world_size)[0])
    grads = [p.grad for p in model.parameters()]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads], dist.get_world_size()


class Replicated(torch.nn.Module):
    def __init__(self, linear, mesh):
        super().__init__()
        self.weight = torch.nn.Parameter(DTensor.from_local(linear.weight.data, mesh, [Replicate()]))

    def forward(self, x):
        return x @ self.weight.to_local().t()


def test_gradients_that_are_dtensors():
    model = tiny_model()
    ChunkRunner(model, retain=3, group=SINGLE).forward_backward(batches()[0])
    for grads, _ in run_ranks(with_dtensors, 2):
        for ours, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_steps_of_these_tests_change_the_loss():
    losses, _ = one_process()
    assert evaluated(tiny_model())[0] == pytest.approx(losses[0], rel=EXACT)
    assert abs(evaluated(tiny_model())[2] - losses[2]) > 1e-3
