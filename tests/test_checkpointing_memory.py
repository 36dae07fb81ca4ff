"""Where live memory lies: what shares a storage, what was put in its place between saves, what has odd strides."""

import pytest
import torch
from torch.optim import SGD

from checkpointing import SINGLE, Checkpointer, CheckpointError, TensorProvider
from checkpointing.fence import Owned, Owners
from checkpointing.snapshot import Snapshotter
from tests.flat_states import Flat, same

LARGE = 100_000


def _stepped(*params: torch.Tensor) -> SGD:
    optimizer = SGD(params, lr=0.1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return optimizer


def test_what_shares_a_storage_with_a_parameter_is_not_the_optimizers():
    storage = torch.zeros(3 * LARGE)  # as a restore gives out: many tensors cut from one piece
    weight, buffer = torch.nn.Parameter(storage[:LARGE]), storage[LARGE : 2 * LARGE]
    owners, optimizer = Owners(), _stepped(weight)
    owners.note(optimizer)
    snapshot = Snapshotter(owners, 0, check=False).take(Flat({"w": weight, "row": weight[5:], "buffer": buffer}))
    assert snapshot.structure.urgent == {"buffer"}


def test_owned_memory_is_the_union_of_its_tensors():
    flat = torch.zeros(10, 10)
    owned = Owned([flat[:2], flat[2:4], flat[6], torch.empty(0), torch.eye(2).to_sparse(), flat[:1]])
    held = [flat[:4], flat[1:3], flat[3, 9], flat[6, 2:4], flat[:4, 3]]
    other = [flat[:5], flat[4], flat[3:7], flat, flat.clone(), flat[6:8], torch.empty(0), flat[5:7, 9]]
    assert ([*map(owned.holds, held)], [*map(owned.holds, other)]) == ([True] * len(held), [False] * len(other))


def test_a_restored_tensor_kept_as_live_is_saved_as_it_was_at_the_call(tmp_path):
    with Checkpointer(tmp_path / "a", group=SINGLE) as first:
        first.save(1, Flat({"w": torch.zeros(LARGE), "buffer": torch.zeros(40 * LARGE)})).wait()
        kept = Flat({})
        first.restore(kept)
    assert kept.loaded is not None
    weight, buffer = torch.nn.Parameter(kept.loaded["w"]), kept.loaded["buffer"]
    with Checkpointer(tmp_path / "b", group=SINGLE, max_bytes_per_s=100e6, check=True) as ckpt:
        optimizer, again = _stepped(weight), Flat({})
        ckpt.save(1, Flat({"w": weight, "buffer": buffer}))
        buffer.fill_(1.0)  # as in a forward; nor is it an error where that is checked
        optimizer.step()
        ckpt.restore(again)
    assert again.loaded is not None
    assert not again.loaded["buffer"].any()


def test_memory_swapped_out_of_a_tensor_that_was_planned(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        memory, state = torch.ones(16), Flat({})
        bias = torch.nn.Parameter(memory)
        state.state = {"bias": bias}
        ckpt.save(1, state).wait()
        bias.data = torch.full((16,), 2.0)
        memory.fill_(3.0)
        state.state = {"bias": memory}  # another tensor, where the first one was
        ckpt.save(2, state).wait()
        ckpt.restore(state)
    assert state.loaded is not None
    assert torch.equal(state.loaded["bias"], memory)


def test_a_slice_that_is_said_to_lie_elsewhere_is_planned_anew(tmp_path):
    part, state = torch.ones(LARGE), Flat({})
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        state.state = {"x": TensorProvider(part, whole=(LARGE,), at=(0,))}
        ckpt.save(1, state).wait()
        state.state = {"x": TensorProvider(part, whole=(2 * LARGE,), at=(LARGE,))}
        with pytest.raises(CheckpointError, match="the slices of tensor 'x' have gaps"):
            ckpt.save(2, state).wait()
        assert ckpt.steps() == [1]


def test_one_element_of_any_stride(tmp_path):
    z = torch.tensor([1 + 2j])
    odd = {
        "second": torch.arange(2.0)[::2],
        "imag": z.conj().imag,
        "column": torch.ones(1, 9)[:, 3:4].t(),
        "conj": z.conj(),
    }
    state = Flat(odd)
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state).wait()
            ckpt.restore(state)
            assert same(state.loaded, odd)


def test_a_new_optimizer_in_the_place_of_one_that_is_gone_is_a_new_one():
    owners, epochs = Owners(), []
    for _ in range(5):
        optimizer = _stepped(torch.nn.Parameter(torch.zeros(LARGE)))
        owners.note(optimizer)
        owners.note(optimizer)
        epochs.append(owners.epoch())
        del optimizer
    assert len({*epochs}) == 5
