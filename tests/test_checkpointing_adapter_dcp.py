"""torch.distributed.checkpoint's own calls, through our writer and reader, on real ranks."""

import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from checkpointing import SINGLE, Checkpointer
from checkpointing.adapters.dcp import DcpReader, DcpWriter
from checkpointing.errors import CheckpointError, IntegrityError, StateError
from tests.flat_states import Flat, same
from tests.spawn import run_ranks


class Net(torch.nn.Module):
    """Weights beyond the small ones, a buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(96, 384), torch.nn.Linear(384, 9, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.b(self.a(x).relu())


def made(*, sharded):
    torch.manual_seed(5)
    net = Net()
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.9))


def step(net, optimizer, number):
    torch.manual_seed(number)
    net(torch.randn(4, 96)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(net, optimizer, number):
    model, optim = get_state_dict(net, optimizer)
    extra = {"step": number, "rates": (0.1, None), "note": {"t": torch.full((2,), float(number))}}
    return {"model": model, "optim": optim, "extra": extra}


def whole(state):
    """Every tensor of a nested state by its path, DTensors whole."""
    out = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}.{key}", item)
        elif isinstance(value, DTensor):
            out[path] = value.full_tensor().clone()
        else:
            out[path] = value.clone() if isinstance(value, torch.Tensor) else value

    walk("", state)
    return out


def rank_saves(info, root, mode):
    """Save step 2 and step 3 while training goes on; what they should hold, whole."""
    writer = DcpWriter(root)
    group = dist.new_group()  # DCP's own collectives run beside those of training
    net, optimizer = made(sharded=info.world_size > 1)
    expected, future = {}, None
    for number in range(1, 5):
        step(net, optimizer, number)
        if number in (2, 3):
            state = state_of(net, optimizer, number)
            expected[number] = whole(state)
            place = f"{root}/step-{number}"
            if mode == "sync":
                dcp.save(state, checkpoint_id=place, storage_writer=writer)
            else:
                future = dcp.async_save(state, checkpoint_id=place, storage_writer=writer, process_group=group)
            net(torch.randn(4, 96))  # moves the buffer before the copy is over
    if future is not None:
        future.result(60)
    writer.close()
    return expected


def rank_loads(info, root, number):
    net, optimizer = made(sharded=info.world_size > 1)
    step(net, optimizer, 9)  # the optimizer has state, and another
    state = state_of(net, optimizer, 0)
    dcp.load(state, checkpoint_id=f"{root}/step-{number}", storage_reader=DcpReader(root))
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    loaded = whole(state_of(net, optimizer, state["extra"]["step"])) | {"rates": state["extra"]["rates"]}
    step(net, optimizer, 7)
    return loaded, whole(state_of(net, optimizer, 0))


@pytest.mark.parametrize(("mode", "ranks"), [("sync", 2), ("async", 2), ("async", 1)])
def test_what_dcp_saves_dcp_loads_on_any_number_of_ranks(tmp_path, mode, ranks):
    root = str(tmp_path / "run")
    expected = run_ranks(rank_saves, ranks, root, mode)[0]
    for number in (2, 3):
        found = {count: run_ranks(rank_loads, count, root, number)[0] for count in (1, 2)}
        for loaded, _ in found.values():
            assert loaded.pop("rates") == (0.1, None)
            assert loaded[".extra.step"] == number
            assert same(loaded, expected[number])
        for name, tensor in found[1][1].items():  # and both train on
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(found[2][1][name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_a_checkpoint_of_ours_is_read_by_dcp_and_the_other_way(tmp_path):
    state = {"model.w": torch.randn(300, 70), "model.b": torch.randn(3)}
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        ckpt.save(4, Flat(state)).wait()
    loaded = {"model": {"w": torch.zeros(300, 70), "b": torch.zeros(3)}}
    dcp.load(loaded, storage_reader=DcpReader(tmp_path / "run"), no_dist=True)
    assert same(loaded, {"model": {"w": state["model.w"], "b": state["model.b"]}})
    writer = DcpWriter(tmp_path / "other", group=SINGLE)
    dcp.save(loaded, checkpoint_id=tmp_path / "other" / "step-0", storage_writer=writer, no_dist=True)
    writer.close()
    back = Flat({})
    with Checkpointer(tmp_path / "other", group=SINGLE) as ckpt:
        assert ckpt.restore(back).step == 0
    assert same(back.loaded, state)


def test_damage_is_found_and_named(tmp_path):
    writer = DcpWriter(tmp_path, group=SINGLE)
    place = tmp_path / "step-1"
    dcp.save({"w": torch.randn(5000)}, checkpoint_id=place, storage_writer=writer, no_dist=True)
    writer.close()
    file = place / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException, match=r"rank-00000.safetensors: tensor 'w', piece 0"):
        dcp.load({"w": torch.zeros(5000)}, checkpoint_id=place, storage_reader=DcpReader(tmp_path), no_dist=True)


def rank_finds_nothing(info, root):
    with pytest.raises(CheckpointException) as found:
        dcp.load({"w": torch.zeros(3)}, checkpoint_id=f"{root}/step-2", storage_reader=DcpReader(root))
    return [str(error) for error, _ in found.value.failures.values()]


def test_why_a_checkpoint_cannot_be_read_is_the_last_line_and_nothing_else_is_said(tmp_path, caplog):
    writer = DcpWriter(tmp_path, group=SINGLE)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "step-1", storage_writer=writer, no_dist=True)
    writer.close()
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-3")
    cases = {
        tmp_path / "step-2": (CheckpointError, f"{tmp_path}: there is no step 2; there are: [1, 3]"),
        tmp_path / "none": (CheckpointError, f"{tmp_path}/none: there is no committed checkpoint"),
        tmp_path / "step-3": (IntegrityError, f"{tmp_path}: step-3: the manifest is that of step 1; was the folder re"),
    }
    for place, (kind, text) in cases.items():
        with pytest.raises(CheckpointException) as found:
            dcp.load({"w": torch.zeros(3)}, checkpoint_id=place, storage_reader=DcpReader(tmp_path), no_dist=True)
        assert str(found.value).splitlines()[-1].startswith(f"checkpointing.errors.{kind.__name__}: {text}")
        assert type(found.value.failures[0][0]) is kind
        with pytest.raises(kind, match=r"there is no|is that of"):  # of callers who ask the reader themselves
            print(DcpReader(place).read_metadata().state_dict_metadata)
    assert "etadata is not found" not in caplog.text
    assert run_ranks(rank_finds_nothing, 2, str(tmp_path))[0] == [cases[tmp_path / "step-2"][1]] * 2


class Odd:
    """What only a pickle could keep."""


def test_what_cannot_be_saved_is_told_and_nothing_is_left(tmp_path):
    writer = DcpWriter(tmp_path, group=SINGLE)
    for state, place, text in (
        ({"odd": Odd()}, tmp_path / "step-1", "'odd' is no plain value"),
        ({"w": torch.ones(2)}, tmp_path / "one", "this writer saves to"),
        ({"w": torch.ones(2)}, None, "give checkpoint_id="),
    ):
        with pytest.raises((CheckpointException, StateError), match=text):
            dcp.save(state, checkpoint_id=place, storage_writer=writer, no_dist=True)
    assert list(tmp_path.iterdir()) == []
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "step-1", storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointException, match="exists already, and a save never overwrites"):
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "step-1", storage_writer=writer, no_dist=True)
    writer.close()


class Refuses(dcp.DefaultSavePlanner):
    """A planner that fails before anything is written."""

    def create_local_plan(self):
        raise ValueError("no plan")


def test_a_save_that_fails_before_it_begins_holds_nothing_up(tmp_path):
    net, optimizer = made(sharded=False)
    step(net, optimizer, 1)
    writer = DcpWriter(tmp_path, group=SINGLE)
    step(net, optimizer, 2)  # seen: from here on its tensors are left live
    for place, planner in ((tmp_path / "step-1", Refuses()), (tmp_path / "nowhere", None)):
        future = dcp.async_save(
            {"net": net.state_dict()}, checkpoint_id=place, storage_writer=writer, planner=planner, no_dist=True
        )
        step(net, optimizer, 3)  # waits for nobody
        with pytest.raises((CheckpointException, StateError)):
            future.result(30)
    dcp.async_save(
        {"net": net.state_dict()}, checkpoint_id=tmp_path / "step-2", storage_writer=writer, no_dist=True
    ).result(30)
    writer.close()
