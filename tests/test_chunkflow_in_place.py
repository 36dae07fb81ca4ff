"""The embedding's and the output projection's gradients, added to `.grad` where it is: `chunkflow.in_place`.

That they are right is shown by test_chunkflow_exact, against whole sequences; here: that they are not made anew for
every chunk, and come by autograd where something else waits for them.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow import SINGLE, ChunkRunner
from chunkflow.in_place import embedding_in_place
from tests.test_chunkflow_exact import batch_of, step_of
from tests.tiny import clone, relative_errors, tiny_model


class Made(TorchDispatchMode):
    """Counts the new tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in [out] if isinstance(out, torch.Tensor) else []:
            self.count += x.shape == self.shape and x.untyped_storage().data_ptr() not in known
        return out


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_chunks_make_no_gradients_as_large_as_the_vocabulary(tied):
    model = tiny_model("llama", tie_word_embeddings=tied).train()
    runner, batch = ChunkRunner(model, group=SINGLE), batch_of(*step_of(7))
    runner.forward_backward(batch)  # after which `.grad` is there
    with Made(model.lm_head.weight.shape) as made:
        runner.forward_backward(batch)
    assert made.count == 0
    watched = clone(model)
    watched.lm_head.weight.register_hook(lambda grad: None)
    with Made(model.lm_head.weight.shape) as made:
        ChunkRunner(watched, group=SINGLE).forward_backward(batch)
    assert made.count >= len(batch.chunks)  # what is counted is there to be counted


@pytest.mark.parametrize("wait", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_weights_see_whole_gradients(wait):
    model, batch, seen = tiny_model("llama").train(), batch_of(*step_of(3)), []
    plain, weight = clone(model), model.lm_head.weight
    getattr(weight, wait)(lambda grad: seen.append((grad.grad if grad is weight else grad).abs().sum().item()))
    for each in (model, plain):
        ChunkRunner(each, group=SINGLE).forward_backward(batch)
    assert len(seen) == len(batch.chunks)
    assert all(value > 0 for value in seen)
    assert max(relative_errors(model, plain).values()) < 1e-5


@pytest.mark.parametrize("padding", [None, 3, -1])
def test_an_embedding_has_the_gradient_of_autograd(padding):
    torch.manual_seed(0)
    ours = torch.nn.Embedding(11, 4, padding_idx=padding, dtype=torch.float64)
    theirs, ids = copy.deepcopy(ours), torch.tensor([[3, 1, 3, 10, 0, 10, 3]])
    grad = torch.randn(1, 7, 4, dtype=torch.float64)
    for _ in range(2):  # the second one is added to the first
        with embedding_in_place(ours):
            out = ours(ids)
        out.backward(grad)
        theirs(ids).backward(grad)
        assert torch.equal(out, theirs(ids))
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_other_embeddings_stay_as_they_are(change):
    module = torch.nn.Embedding(11, 4, **change)
    with embedding_in_place(module):
        assert "forward" not in module.__dict__
