"""RoundPipe in a job: transformers models through `launch.split`, on any number of ranks, against one process."""

import pytest
import torch
import torch.distributed as dist

from checkpointing import Checkpointer, KeepLast
from chunkflow import SINGLE, ChunkLoader, ChunkRunner, MemorySource
from chunkflow.reference import float64_throughout
from launch import TrainState
from launch.config import OptimizerConfig
from launch.gradnorm import clip_
from launch.optimizer import build_optimizer
from launch.roundpipe_runner import RoundPipeRunner
from pipeline.config import PipelineConfig
from tests.spawn import run_ranks
from tests.tiny import sequence, tiny_model

pytestmark = pytest.mark.timeout(240)
SOURCE = MemorySource([sequence(n, 4 + 3 * (n % 9)) for n in range(24)])
TOKENS, BATCH = 32, 6


def job_model(*, frozen=(), padding=None):
    model = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True, pad_token_id=padding)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)))
    return model


def rank_trains(info, folder, ranks, until, options):
    """Resume from `folder`, train to step `until` in fp64, save; losses, norms and the whole state."""
    options = dict(options)
    model = job_model(frozen=options.pop("frozen", ()), padding=options.pop("padding", None))
    loader = ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1)
    if ranks == 0:
        world, runner, whole, held = SINGLE, ChunkRunner(model, group=SINGLE), None, model
    else:
        world = dist.group.WORLD
        config = PipelineConfig(schedule="roundpipe", ranks=ranks, timeout_s=30, **options)
        with float64_throughout():
            runner = RoundPipeRunner(
                model, config, microbatches=BATCH, tokens=TOKENS, group=world, data_group=None, rank=info.rank,
                device=torch.device("cpu"),
            )  # fmt: skip
        whole, held = runner.whole, runner.model
    optimizer = build_optimizer(held, OptimizerConfig(), whole=whole)
    state = TrainState(held, optimizer, loader, whole=whole, rank=info.rank, world_size=max(1, ranks))
    losses, norms = [], []
    with Checkpointer(folder, keep=KeepLast(3), group=world) as checkpoints, float64_throughout(), loader:
        checkpoints.restore(state)
        steps = iter(loader)
        while state.step < until:
            losses.append(float(runner.forward_backward(next(steps))))
            grads = [p.grad for p in held.parameters() if p.grad is not None]
            norm = runner.grad_norm() if ranks else torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
            norms.append(float(norm))
            clip_(held.parameters(), norm, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
        checkpoints.save(state.step, state).wait(timeout_s=60)
        tensors = {name: x.clone() for name, x in state.state_dict().items() if isinstance(x, torch.Tensor)}
    if ranks:
        runner.close()
    return losses, norms, {name: x for name, x in tensors.items() if not name.startswith("rng.")}


def together(results):
    """The state of all ranks; none holds what another does."""
    states = {}
    for _, _, state in results:
        assert not [name for name in state if name in states and name.startswith(("model.", "optim."))]
        states |= state
    return results[0][0], results[0][1], states


CASES = {
    "tied": {"rounds": 1},
    "two rounds": {"rounds": 2, "open_slots": 3},
    "frozen in front": {"frozen": ("model.embed_tokens", "model.layers.0.", "model.layers.1.")},
    "frozen in the middle": {"frozen": ("model.layers.2.",), "padding": 5},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_number_of_ranks_gives_the_same_bits_and_those_are_right(tmp_path, case):
    expected = run_ranks(rank_trains, 1, str(tmp_path / "plain"), 0, 3, case | {"rounds": 1})[0]
    first = None
    for ranks in (1, 2, 3):
        losses, norms, states = together(run_ranks(rank_trains, ranks, str(tmp_path / str(ranks)), ranks, 3, case))
        assert losses == pytest.approx(expected[0], rel=1e-12)
        assert norms == pytest.approx(expected[1], rel=1e-10)
        assert states.keys() == expected[2].keys()
        for name, tensor in expected[2].items():
            torch.testing.assert_close(states[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
        first = first or (losses, norms, states)
        assert (losses, norms) == first[:2]
        assert all(torch.equal(tensor, first[2][name]) for name, tensor in states.items())
