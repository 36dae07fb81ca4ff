"""Loading a checkpoint into what is there."""

import torch

from checkpointing import SINGLE, Checkpointer


class Holder:
    def __init__(self, state):
        self.state, self.loaded = state, {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


def test_the_state_of_a_generator_can_be_given_back_to_it(tmp_path):
    """Torch reads it from the start of the storage: a view into a larger block crashed the process."""
    state = {"a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(5), "rng": torch.get_rng_state()}
    with Checkpointer(tmp_path / "run", group=SINGLE) as checkpoints:
        checkpoints.save(1, Holder(state)).wait()
    holder = Holder({name: value.clone() for name, value in state.items()})
    with Checkpointer(tmp_path / "run", group=SINGLE) as checkpoints:
        checkpoints.restore(holder)
    expected = torch.rand(3)
    torch.set_rng_state(holder.loaded["rng"])
    assert torch.equal(torch.rand(3), expected)
