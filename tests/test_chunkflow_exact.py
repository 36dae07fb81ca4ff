"""Chunked training against every sequence whole, alone, through SDPA, in fp64: loss and every gradient to 1e-10.

The same step for every case: one sequence of N chunks with a ragged tail, a short one packed behind the tail, and a
standalone chunk of two more. Loss weights are uneven and some are zero.
"""

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from chunkflow import SINGLE, ChunkRunner, SourceError, StepBatch
from chunkflow.reference import float64_throughout, full_sequence_step
from tests.spawn import run_ranks
from tests.tiny import chunk, clone, group_of, relative_errors, sequence, tiny_model

CHUNK_TOKENS, RAGGED = 20, 13
EXACT = 1e-10
CASES = [(n, k) for n in (1, 2, 3, 7) for k in range(1, n + 1)]
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-attention-dropout": {"attention_dropout": 0.2},
    "qwen3": {},
    "mistral": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def make(name):
    model = tiny_model(name.split("-")[0], **MODELS[name]).train()
    return model, 5 if "attention-dropout" in name else None


def step_of(num_chunks):
    """Return the sequences of the step, and its chunks as one rank would have them."""
    long = CHUNK_TOKENS * (num_chunks - 1) + RAGGED
    sequences = {0: sequence(0, long), 1: sequence(1, 5), 2: sequence(2, 8), 3: sequence(3, 11)}
    chunks = [chunk(sequences, [(2, 0, 8), (3, 0, 11)])]
    if num_chunks == 1:
        return sequences, [*chunks, chunk(sequences, [(0, 0, long), (1, 0, 5)])]
    return sequences, chunks + group_of(sequences, 0, CHUNK_TOKENS, group=0, tail=[(1, 0, 5)])


def batch_of(sequences, chunks, step=5):
    denominator = sum(float(s.loss_weights.sum(dtype=np.float64)) for s in sequences.values())
    return StepBatch(step, tuple(chunks), denominator, program="")


@pytest.fixture(scope="module")
def oracle():
    """Loss and gradients of the whole sequences, computed once a model and N."""
    known = {}

    def ask(name, num_chunks):
        if (name, num_chunks) not in known:
            model, seed = make(name)
            sequences, chunks = step_of(num_chunks)
            denominator = batch_of(sequences, chunks).denominator
            with float64_throughout():
                loss = full_sequence_step(model, sequences, denominator=denominator, dropout_seed=seed)
            known[name, num_chunks] = (float(loss), model)
        return known[name, num_chunks]

    return ask


@pytest.mark.parametrize(("num_chunks", "retain"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_whole_sequences(name, num_chunks, retain, oracle, monkeypatch):
    monkeypatch.setattr("chunkflow.attention.tiles.PREFIX_BLOCK", 32)  # blocks that do not fall on chunk borders
    loss, reference = oracle(name, num_chunks)
    model, _ = make(name)
    batch = batch_of(*step_of(num_chunks))
    with float64_throughout():
        ours = ChunkRunner(model, retain=retain, group=SINGLE).forward_backward(batch)
    assert abs(float(ours) / loss - 1) < EXACT
    assert max(relative_errors(model, reference).values()) < EXACT


def test_evaluate_gives_the_training_loss_and_leaves_no_gradient(oracle):
    loss, _ = oracle("llama", 3)
    model, _ = make("llama")
    with float64_throughout():
        ours = ChunkRunner(model, group=SINGLE).evaluate(batch_of(*step_of(3)))
    assert abs(float(ours) / loss - 1) < EXACT
    assert all(p.grad is None for p in model.parameters())


def test_other_dropout_is_replayed_in_the_second_forward():
    """Residual dropout cannot be that of the whole run; but keeping activations or recomputing them must not matter."""
    results = []
    for retain in (1, 2, 7):
        model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0).train()
        runner = ChunkRunner(model, retain=retain, group=SINGLE)
        torch.manual_seed(3)
        loss = runner.forward_backward(batch_of(*step_of(7)))
        results.append((float(loss), model, torch.get_rng_state()))
    for loss, model, rng in results[1:]:
        assert loss == results[0][0]
        assert max(relative_errors(model, results[0][1]).values()) < EXACT
        assert torch.equal(rng, results[0][2])  # the stream goes on as if nothing had run twice


def test_recomputing_changes_no_bit():
    grads = []
    for retain in (1, 3, 7):
        model, _ = make("llama")
        ChunkRunner(model, retain=retain, group=SINGLE).forward_backward(batch_of(*step_of(7)))
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def test_activation_checkpointing_inside_a_chunk_changes_no_bit():
    grads = []
    for enabled in (False, True):
        model, _ = make("llama")
        if enabled:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ChunkRunner(model, retain=2, group=SINGLE).forward_backward(batch_of(*step_of(3)))
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_two_steps_without_zero_grad_add_up(oracle):
    _, reference = oracle("llama", 3)
    model, _ = make("llama")
    runner = ChunkRunner(model, group=SINGLE)
    with float64_throughout():
        for _ in range(2):
            runner.forward_backward(batch_of(*step_of(3)))
    for parameter in model.parameters():
        parameter.grad /= 2
    assert max(relative_errors(model, reference).values()) < EXACT


def rank_step(info, name, num_chunks, retain, wrapped, repeats):
    """Rank 0 trains the long sequence, rank 1 the standalone chunk."""
    model, _ = make(name)
    sequences, chunks = step_of(num_chunks)
    batch = batch_of(sequences, chunks[1:] if info.rank == 0 else chunks[:1])
    runner = ChunkRunner(DistributedDataParallel(model) if wrapped else model, retain=retain)
    with float64_throughout():
        losses = [float(runner.forward_backward(batch)) for _ in range(repeats)]
    return losses, [p.grad for p in model.parameters()]


TWO_RANKS = [
    *((name, 3, 3, "plain") for name in MODELS),
    *(("llama-tied", n, k, kind) for n, k in [(1, 1), (3, 1), (3, 3), (7, 2), (7, 7)] for kind in ("plain", "ddp")),
]


@pytest.mark.parametrize(("name", "num_chunks", "retain", "kind"), TWO_RANKS)
def test_two_ranks_equal_one(name, num_chunks, retain, kind, oracle):
    loss, reference = oracle(name, num_chunks)
    results = run_ranks(rank_step, 2, name, num_chunks, retain, kind == "ddp", 1)
    for losses, grads in results:
        assert abs(losses[0] / loss - 1) < EXACT
        for ours, parameter in zip(grads, reference.parameters(), strict=True):
            assert (ours - parameter.grad).abs().max() < EXACT * parameter.grad.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_two_ranks_accumulate_over_steps(oracle):
    loss, reference = oracle("llama", 3)
    for losses, grads in run_ranks(rank_step, 2, "llama", 3, 3, False, 3):
        assert losses == [losses[0]] * 3
        assert abs(losses[0] / loss - 1) < EXACT
        for ours, parameter in zip(grads, reference.parameters(), strict=True):
            assert (ours / 3 - parameter.grad).abs().max() < EXACT * parameter.grad.abs().max()


def rank_with_nothing(info):
    model = clone(make("llama")[0])
    model.lm_head.requires_grad_(False)
    sequences, chunks = step_of(3)
    batch = batch_of(sequences, chunks if info.rank == 0 else [])
    ChunkRunner(model).forward_backward(batch)
    return [None if p.grad is None else p.grad.double().sum().item() for p in model.parameters()]


def test_a_rank_without_chunks_takes_part_and_unused_parameters_stay_without_gradient():
    results = run_ranks(rank_with_nothing, 2)
    assert results[0] == results[1]
    assert results[0][-1] is None
    assert None not in results[0][:-1]


def test_a_sequence_beyond_learned_positions_is_named():
    model = tiny_model("gpt2", n_positions=2 * CHUNK_TOKENS)
    with pytest.raises(SourceError, match=r"sample 0 has 53 tokens or more, .* learned positions for 40"):
        ChunkRunner(model, group=SINGLE).forward_backward(batch_of(*step_of(3)))
    assert all(p.grad is None for p in model.parameters())


def test_token_outside_the_vocabulary_is_named():
    sequences, chunks = step_of(3)
    chunks[2].tensors()["input_ids"][0, 4] = 97
    model, _ = make("llama")
    with pytest.raises(SourceError, match=r"sample 0, token 24: id 97 .* vocabulary of 97"):
        ChunkRunner(model, group=SINGLE).forward_backward(batch_of(sequences, chunks))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("label", [-1, 97])
def test_target_outside_the_vocabulary_is_named_before_anything_runs(label):
    sequences, chunks = step_of(3)
    chunks[2].tensors()["shift_labels"][0, [0, 4]] = label
    chunks[2].tensors()["loss_weights"][0, [0, 4]] = torch.tensor([0.0, 1.0])
    model, _ = make("llama")
    with pytest.raises(SourceError, match=rf"sample 0, token 24: target {label} .* vocabulary of 97"):
        ChunkRunner(model, group=SINGLE).forward_backward(batch_of(sequences, chunks))
    assert all(p.grad is None for p in model.parameters())
