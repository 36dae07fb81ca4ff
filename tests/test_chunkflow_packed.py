"""packed() trains a plain transformers model on the same loss as one sample at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chunkflow.errors import PlanError
from chunkflow.index import StoredSource
from chunkflow.loader import ChunkLoader
from chunkflow.sources import Sample
from tests.long_tail import CHUNK, long_tail

VOCAB = 64


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).double().train()


def short(tmp_path):
    return long_tail(tmp_path, longest=CHUNK, vocab=VOCAB)


def one_by_one(model, source, samples) -> torch.Tensor:
    """Mean loss of the targets of these samples, each alone and unpacked."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in samples:
        sample = source.read(index)
        logits = model(torch.from_numpy(sample.input_ids)[None], use_cache=False).logits[0]
        labels = torch.from_numpy(sample.shift_labels)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def gradients(model) -> list[torch.Tensor]:
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_loss_and_gradients_are_those_of_single_samples(tmp_path, attention, world_size):
    source, model = short(tmp_path), tiny_llama(attention)
    options = {"chunk_tokens": CHUNK, "global_batch": 6, "world_size": world_size}
    loaders = [ChunkLoader(source, rank=rank, **options) for rank in range(world_size)]
    streams = [loader.packed() for loader in loaders]
    for step in range(loaders[0].num_steps):
        plan = loaders[0].plan(step)
        total, counts = 0.0, []
        for loader, stream in zip(loaders, streams, strict=True):
            count = 0
            while loader.step == step:
                loss = model(**next(stream)).loss
                loss.backward()
                total, count = total + float(loss.detach()), count + 1
            counts.append(count)
        assert len(set(counts)) == 1  # collectives of a foreign loop stay in step
        assert counts[0] == max(len(chunks) for chunks in plan.ranks)
        got = gradients(model)
        expected = one_by_one(model, source, plan.samples)
        expected.backward()
        # transformers computes this loss in fp32
        assert total == pytest.approx(float(expected.detach()), rel=1e-6)
        for mine, reference in zip(got, gradients(model), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-8)
    assert all(next(stream, None) is None for stream in streams)


def test_the_keyword_arguments(tmp_path):
    source = short(tmp_path)
    loader = ChunkLoader(source, chunk_tokens=CHUNK, global_batch=23)
    chunks = next(iter(ChunkLoader(source, chunk_tokens=CHUNK, global_batch=23))).chunks
    packed = list(loader.packed())
    assert len(packed) == len(chunks)
    for kwargs, chunk in zip(packed, chunks, strict=True):
        tensors = chunk.tensors()
        assert torch.equal(kwargs["input_ids"], tensors["input_ids"])
        assert torch.equal(kwargs["shift_labels"], tensors["shift_labels"])
        assert torch.equal(kwargs["cu_seq_lens_q"], tensors["cu_seqlens_q"])
        assert torch.equal(kwargs["cu_seq_lens_k"], tensors["cu_seqlens_q"])
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(s.length for s in chunk.segments)
        assert int(kwargs["num_items_in_batch"]) == source.weights.sum()
        # A loss that shifts by itself finds the same targets.
        assert torch.equal(kwargs["labels"][0, 1:], kwargs["shift_labels"][0, :-1])
        assert kwargs["labels"][0, kwargs["cu_seq_lens_q"][:-1].long()].eq(-100).all()
    assert len({id(kwargs) for kwargs in packed}) == len(packed)


def test_a_save_inside_a_step_repeats_the_step(tmp_path):
    source = short(tmp_path)
    with ChunkLoader(source, chunk_tokens=CHUNK, global_batch=12) as loader:
        stream = loader.packed()
        first = next(stream)
        assert loader.state_dict()["step"] == 0
        again = ChunkLoader(source, chunk_tokens=CHUNK, global_batch=12)
        again.load_state_dict(loader.state_dict())
        assert torch.equal(next(again.packed())["input_ids"], first["input_ids"])


def test_split_samples_are_refused_at_once(tmp_path):
    loader = ChunkLoader(long_tail(tmp_path), chunk_tokens=CHUNK, global_batch=5)
    longest = int(loader.source.lengths.max())
    with pytest.raises(
        PlanError, match=f"packed.. cannot split, and sample .* has {longest} tokens for chunks of 16; "
    ):
        loader.packed()


class Halved(StoredSource):
    """Every target counts half."""

    def read(self, index):
        sample = super().read(index)
        return Sample(sample.input_ids, sample.shift_labels, sample.loss_weights / 2)


def test_fractional_weights_are_refused(tmp_path):
    source = Halved(short(tmp_path).folder)
    source.weights = source.weights / 2
    stream = ChunkLoader(source, chunk_tokens=CHUNK, global_batch=5).packed()
    with pytest.raises(PlanError, match=r"cannot express the loss weights of step 0, samples \[.*only 0 and 1"):
        next(stream)


class Masked(StoredSource):
    """The first target of every sample has weight 0, and a label all the same."""

    def read(self, index):
        sample = super().read(index)
        weights = sample.loss_weights.copy()
        weights[0] = 0
        return Sample(sample.input_ids, sample.shift_labels, weights)


def test_a_target_of_weight_zero_is_no_target(tmp_path):
    source = Masked(short(tmp_path).folder)
    source.weights = [float(source.read(i).loss_weights.sum()) for i in range(len(source))]
    source.weights = torch.tensor(source.weights, dtype=torch.float64).numpy()
    for kwargs in ChunkLoader(source, chunk_tokens=CHUNK, global_batch=23).packed():
        assert kwargs["shift_labels"][0, kwargs["cu_seq_lens_q"][:-1].long()].eq(-100).all()
