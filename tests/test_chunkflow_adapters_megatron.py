"""Megatron-core's GPTModel in chunks equals GPTModel whole, on the CPU, in fp64."""

import pytest
import torch
import torch.distributed as dist

from chunkflow import ChunkRunner, UnsupportedModelError
from tests.chunk_steps import batches, source_of
from tests.spawn import run_ranks
from tests.tiny import VOCABULARY

pytest.importorskip("megatron.core", reason="the extra [megatron] is not installed")
SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}


def gpt(core_attention=None, positions="learned_absolute", **changes):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from chunkflow.adapters.megatron import chunked

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.random.get_cuda_rng_tracker = lambda *_, **__: NoTracker()
    settings = {"use_cpu_initialization": True, "attention_dropout": 0.0, "hidden_dropout": 0.0, **SIZES, **changes}
    config = TransformerConfig(**{"params_dtype": torch.float64, **settings})
    spec = chunked(get_gpt_layer_local_spec())
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    torch.manual_seed(0)
    return GPTModel(config, spec, VOCABULARY, 512, position_embedding_type=positions).double()


class NoTracker:
    def fork(self, *_):
        from contextlib import nullcontext

        return nullcontext()


class Whole(torch.nn.Module):
    """Causal attention by SDPA, as the oracle; Megatron's own core attention needs CUDA."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, query, key, value, *_, **__):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def train_whole(changes):
    model = gpt(Whole, **changes)
    for step, batch in enumerate(batches()[:1]):
        source = source_of(step)
        total = 0.0
        for n in range(len(source)):
            sample = source.read(n)
            ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.shift_labels)[None]
            positions = torch.arange(ids.shape[1])[None]
            logits = model(ids, positions, None)[0]
            losses = torch.nn.functional.cross_entropy(logits, labels[0], ignore_index=-100, reduction="none")
            loss = (losses * torch.from_numpy(sample.loss_weights)).sum() / batch.denominator
            loss.backward()
            total += float(loss.detach())
    return total, model


def compare(info, retain, changes):
    from chunkflow.adapters.megatron import MegatronRunner

    expected, whole = train_whole(changes)
    model = gpt(**changes)
    loss = float(MegatronRunner(model, retain=retain).forward_backward(batches(info.rank, info.world_size)[0]))
    errors = [
        float((p.grad - q.grad).abs().max() / q.grad.abs().max())
        for p, q in zip(model.parameters(), whole.parameters(), strict=True)
    ]
    return loss - expected, max(errors), len(errors)


@pytest.mark.parametrize(
    ("retain", "changes"), [(1, {}), (3, {}), (2, {"apply_query_key_layer_scaling": True})], ids=["1", "3", "scaled"]
)
def test_gpt_model_in_chunks_equals_gpt_model_whole(retain, changes):
    """Layer scaling keeps the range of fp16: Megatron's softmax takes it back, so it changes no result."""
    for difference, worst, parameters in run_ranks(compare, 2, retain, changes, timeout_s=120):
        assert abs(difference) < 1e-10
        assert worst < 1e-10
        assert parameters > 20


def refuse(info):
    from chunkflow.adapters.megatron import MegatronRunner

    with pytest.raises(UnsupportedModelError, match=r"0 of 2 attention layers .* build it from chunked"):
        MegatronRunner(gpt(Whole))
    with pytest.raises(UnsupportedModelError, match=r"config\.window_size = .* set it to None"):
        MegatronRunner(gpt(window_size=(4, 0)))
    model = gpt()
    model.position_embedding_type = "rope"
    with pytest.raises(UnsupportedModelError, match="'rope': Megatron counts its positions"):
        MegatronRunner(model)
    with pytest.raises(UnsupportedModelError, match="outside a MegatronRunner"):
        gpt()(torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)[None], None)
    with pytest.raises(UnsupportedModelError, match="GPTModel is not a transformers model"):
        ChunkRunner(gpt())
    return dist.get_world_size()


def test_what_would_not_be_exact_is_refused():
    run_ranks(refuse, 2)
