"""The loop of the README, in somebody else's script, on two ranks."""

import torch

from checkpointing import Checkpointer, KeepLast
from chunkflow import ChunkLoader, ChunkRunner, MemorySource
from launch import TrainState
from tests.spawn import run_ranks
from tests.tiny import sequence, tiny_model


def own_loop(_info, folder, most_steps):
    model = tiny_model(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    source = MemorySource([sequence(n, 10 + 7 * n) for n in range(12)])
    loader = ChunkLoader(source, chunk_tokens=32, global_batch=3)
    runner = ChunkRunner(model, retain=1)
    state = TrainState(model, optimizer, loader)
    losses = []
    with Checkpointer(folder, keep=KeepLast(3)) as checkpoints:
        checkpoints.restore(state)
        for batch in loader:
            losses.append(float(runner.forward_backward(batch)))
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            checkpoints.save(state.step, state).wait()
            if state.step == most_steps:
                break
        loader.close()
    return losses


def test_an_own_loop_saves_and_resumes_on_two_ranks(tmp_path):
    whole = run_ranks(own_loop, 2, str(tmp_path / "whole"), 4)
    first = run_ranks(own_loop, 2, str(tmp_path / "parts"), 2)
    second = run_ranks(own_loop, 2, str(tmp_path / "parts"), 4)
    assert whole[0] == whole[1]
    assert len(whole[0]) == 4
    assert first[0] + second[0] == whole[0]
