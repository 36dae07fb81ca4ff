"""Layers that run twice, compiled layers, and keys and values on the host: no gradient changes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from chunkflow import SINGLE, ChunkflowError, ChunkRunner
from tests.chunk_steps import batches, furthest, one_process, optimizer_of
from tests.tiny import relative_errors, tiny_model

REENTRANT = [pytest.param(flag, id=f"use_reentrant={flag}") for flag in (False, True)]


def gradients(model, retain, **settings):
    ChunkRunner(model, retain=retain, group=SINGLE, **settings).forward_backward(batches(retain=retain)[0])
    return [p.grad for p in model.parameters()]


def dropping(**changes):
    """Dropout everywhere: a second forward with other masks would be seen."""
    return tiny_model("gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2, **changes).train()


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs) > 5
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("retain", [1, 3, 6])
def test_checkpointed_layers_change_no_bit(retain):
    assert_same_bits(gradients(tiny_model().train(), retain, checkpoint_layers=True), gradients(tiny_model(), retain))


def test_checkpointed_layers_see_the_same_dropout():
    found = []
    for setting in ({}, {"checkpoint_layers": True}):
        torch.manual_seed(5)
        found.append(gradients(dropping(), 2, **setting))
    assert_same_bits(*found)


def test_checkpointed_layers_keep_their_input_only():
    kept = []
    for on in (False, True):
        bytes_kept = 0

        def pack(x):
            nonlocal bytes_kept
            bytes_kept += x.nbytes
            return x

        runner = ChunkRunner(tiny_model(num_hidden_layers=4), retain=1, group=SINGLE, checkpoint_layers=on)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            runner.evaluate(batches(retain=1)[0])
            assert bytes_kept == 0
            runner.forward_backward(batches(retain=1)[2])
        kept.append(bytes_kept)
    assert kept[1] < 0.6 * kept[0]


def test_two_ways_at_once_are_refused_and_the_model_is_left_as_it_was():
    model = tiny_model()
    before = [dict(layer.__dict__) for layer in model.model.layers]
    gradients(model, 1, checkpoint_layers=True)
    assert [dict(layer.__dict__) for layer in model.model.layers] == before
    model.activation_checkpointing_enable()
    with pytest.raises(ChunkflowError, match="checkpoint_layers is on and so is the model's own"):
        ChunkRunner(model, group=SINGLE, checkpoint_layers=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the forward without graph
@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("retain", [1, 3])
def test_the_models_own_checkpointing_changes_no_bit(use_reentrant, retain):
    model = tiny_model().train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_bits(gradients(model, retain), gradients(tiny_model().train(), retain))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_the_models_own_checkpointing_under_dropout_and_lora(use_reentrant):
    peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    found = []
    for on in (False, True):
        torch.manual_seed(5)
        model = dropping()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(model, config).train()
        torch.manual_seed(6)
        found.append([g for g in gradients(model, 2) if g is not None])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("retain", [1, 3])
def test_keys_and_values_on_the_host_change_no_bit(retain, monkeypatch):
    monkeypatch.setattr("chunkflow.attention.tiles.PREFIX_BLOCK", 32)  # several blocks travel
    assert_same_bits(gradients(tiny_model(), retain, offload=True), gradients(tiny_model(), retain))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_keys_and_values_on_the_host_of_a_gpu():
    kept, offloaded = tiny_model().cuda(), tiny_model().cuda()
    gradients(kept, 2)
    gradients(offloaded, 2, offload=True)
    assert max(relative_errors(offloaded, kept).values()) < 1e-10


def train_compiled(backend, **settings):
    torch._dynamo.reset()
    model = tiny_model(dtype=torch.float32)
    runner = ChunkRunner(model, retain=3, group=SINGLE, **settings)
    counter = CompileCounterWithBackend(backend)
    for layer in model.model.layers:
        layer.compile(backend=counter)
    optimizer, losses, frames = optimizer_of(model), [], []
    for batch in [*batches(), *batches()]:
        losses.append(float(runner.forward_backward(batch)))
        frames.append(counter.frame_count)
        optimizer.step()
        optimizer.zero_grad()
    torch._dynamo.reset()
    return losses[:3], frames


CASES = [
    pytest.param("aot_eager", {}, id="plain"),
    pytest.param("aot_eager", {"checkpoint_layers": True}, id="checkpointed", marks=pytest.mark.slow),
    pytest.param("inductor", {}, id="inductor", marks=pytest.mark.slow),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("backend", "settings"), CASES)
def test_compiled_layers_train_the_same_and_are_compiled_once(backend, settings):
    losses, frames = train_compiled(backend, **settings)
    expected, _ = one_process(dtype=torch.float32)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert frames[2] > 0
    assert frames[-1] == frames[2]  # the second round of steps compiles nothing
    assert frames[-1] <= 40


def test_a_compiled_wrapper_is_refused_with_what_to_do():
    with pytest.raises(ChunkflowError, match=r"layer\.compile\(\)"):
        ChunkRunner(torch.compile(tiny_model()), group=SINGLE)


def test_the_steps_tell_weights_apart():
    _, weights = one_process()
    assert furthest(weights, {n: p.detach() for n, p in tiny_model().named_parameters()}) > 1e-3
