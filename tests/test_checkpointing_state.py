"""What a state may be; everything else is refused with the key and the remedy."""

import pytest
import torch

from checkpointing import SINGLE, Checkpointer, CheckpointError, TensorProvider
from checkpointing.errors import StateError
from checkpointing.state import flatten, gather, parts_of, under
from tests.flat_states import Flat

MODEL = torch.nn.Linear(2, 2)


class Marked(torch.Tensor):
    pass


REFUSED = [
    ({}, "the state is of type dict; give a Stateful, or a mapping of prefix to Stateful"),
    ([1], "the state is of type list"),
    (torch.optim.SGD(MODEL.parameters()), "the state is a torch optimizer.*use launch.TrainState"),
    ({"optim": torch.optim.AdamW(MODEL.parameters())}, "'optim' is a torch optimizer.*use launch.TrainState"),
    ({"model": {"w": 1}}, r"'model' is of type dict, without state_dict\(\) and load_state_dict\(\); wrap it"),
    ({"": Flat({})}, "the prefix ''"),
    ({3: Flat({})}, "the prefix 3"),
    ({"a": Flat({}), "a.b": Flat({})}, r"the prefixes 'a' and 'a\.b' overlap"),
    ({"a": Flat({0: 1})}, r"state_dict\(\) of 'a' has the key 0 of type int"),
    ({"a": Flat({"": 1})}, r"state_dict\(\) of 'a' has the key ''"),
    ({"a": Flat([1])}, r"state_dict\(\) of 'a' gave of type list|gave of type list"),
    ({"a": Flat({"b": {"c": torch.ones(1)}})}, r"'a\.b' at \['c'\] is of type Tensor; give every tensor a name"),
    ({"a": Flat({"b": object()})}, r"'a\.b' is of type object"),
    ({"a": Flat({"\ud800": 1})}, "is not valid Unicode"),
    (Flat({"__metadata__": 1}), "'__metadata__' belongs to safetensors"),
    ({"a": Flat({"b": torch.ones(1, dtype=torch.complex128)})}, r"'a\.b' has the dtype torch.complex128.*view_as_real"),
    ({"a": Flat({"b": torch.ones(1, device="meta")})}, r"'a\.b' is on the meta device"),
    ({"a": Flat({"b": torch.eye(2).to_sparse()})}, r"'a\.b' is sparse"),
    ({"a": Flat({"b": torch.eye(2).to_sparse_csr()})}, r"'a\.b' is sparse"),
    ({"a": Flat({"b": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})}, r"'a\.b' is sparse, nested"),
    (
        {"a": Flat({"b": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)})},
        r"'a\.b' is a NestedTensor",
    ),
    ({"a": Flat({"b": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)})}, r"'a\.b' is .*quantized"),
    ({"a": Flat({"b": torch.ones(2, 2).to_mkldnn()})}, r"'a\.b' is "),
    ({"a": Flat({"b": torch.nn.UninitializedParameter()})}, r"'a\.b' is a UninitializedParameter"),
    ({"a": Flat({"b": TensorProvider(torch.eye(2).to_sparse())})}, r"'a\.b' is sparse"),
    ({"a": Flat({"b": (1, 2)})}, r"'a\.b' is of type tuple; make it a list"),
    ({"a": Flat({"b": {1: 2}})}, r"'a\.b' has the key 1 of type int"),
    ({"a": Flat({"b": {"c": [1, {"d": {2}}]}})}, r"'a\.b' at \['c'\]\[1\]\['d'\] is of type set; make it a sorted"),
    (
        {"a": Flat({"b": torch.ones(1).as_subclass(Marked)})},
        r"'a\.b' is a Marked; plain tensors and DTensors can be saved",
    ),
]


@pytest.mark.parametrize(("state", "text"), REFUSED)
def test_refused_states_name_the_key_and_the_remedy(tmp_path, state, text):
    ckpt = Checkpointer(tmp_path / "run", group=SINGLE)
    with pytest.raises(StateError, match=rf"save of step 3 failed: .*{text}"):
        ckpt.save(3, state)
    ckpt.close()  # said once is enough
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [-1, 1.0, True, None, 10**18])
def test_refused_steps(tmp_path, step):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt, pytest.raises(StateError, match="it must be an int from 0"):
        ckpt.save(step, Flat({"a": 1}))


def test_a_restore_refuses_the_same_states(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt, pytest.raises(CheckpointError, match=r"'optim' is a torch opt"):
        ckpt.restore({"optim": torch.optim.SGD(MODEL.parameters())})


def test_a_state_dict_that_raises_is_told_and_is_the_cause(tmp_path):
    class Broken(Flat):
        def state_dict(self):
            raise RuntimeError("no state today")

    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        handle = ckpt.save(1, {"a": Broken({})})
        with pytest.raises(CheckpointError, match="RuntimeError: no state today") as caught:
            handle.wait()
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)


def test_tied_tensors_are_found_and_lookalikes_are_not():
    base = torch.arange(12.0).reshape(3, 4)
    z = torch.ones(2, dtype=torch.complex64)
    specs = flatten(
        gather(Flat({
            "a": base, "b": base, "c": base.view(12), "d": base.t(), "e": base.clone(), "f": base[:2], "g": base[:2],
            "none1": torch.empty(0), "none2": torch.empty(0), "z1": z, "z2": z.conj(),
        }))
    ).specs  # fmt: skip
    assert {spec.name: spec.alias_of for spec in specs if spec.alias_of} == {"b": "a", "g": "f"}


def test_prefixes():
    assert list(parts_of({"a": MODEL, "b": Flat({})})) == ["a", "b"]
    assert under("a", {"a.x": 1, "ab.x": 2, "a": 3, "a.b.c": 4}) == {"x": 1, "b.c": 4}
    assert under("", {"a.x": 1}) == {"a.x": 1}
