"""DeepSpeed's own save_checkpoint and load_checkpoint, ZeRO-1 on two ranks, through our engine."""

import json
import os

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from tests.flat_states import Flat, same
from tests.spawn import run_ranks

pytestmark = pytest.mark.timeout(300)
ENV = {"DS_ACCELERATOR": "cpu"}
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


class Net(torch.nn.Module):
    """Weights beyond the small ones, and a buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 512), torch.nn.Linear(512, 3)
        self.register_buffer("seen", torch.zeros(70_000))

    def forward(self, x):
        self.seen += 1
        return self.b(self.a(x).relu())


def made(seed, via):
    import deepspeed

    from checkpointing.adapters.deepspeed import LongrailCheckpointEngine, use_for_datastates

    torch.manual_seed(seed)
    config = dict(CONFIG)
    if via == "config":
        use_for_datastates()
        config["datastates_ckpt"] = {"host_cache_size": 0.125}
    engine = deepspeed.initialize(model=Net(), config=config)[0]
    if via == "line":
        engine.checkpoint_engine = LongrailCheckpointEngine()
    assert type(engine.checkpoint_engine) is LongrailCheckpointEngine
    return engine


def step(engine, number):
    torch.manual_seed(10 * number + torch.distributed.get_rank())
    engine.backward(engine(torch.randn(2, 64).bfloat16()).float().square().mean())
    engine.step()
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


def rank_trains(info, root, via):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: nothing to compile, for minutes
    os.environ["LOCAL_RANK"] = str(info.rank)
    deepspeed.init_distributed("gloo")
    engine = made(1, via)
    step(engine, 1)
    assert engine.save_checkpoint(root, client_state={"note": [1, "x"]})
    assert not os.path.exists(f"{root}/latest")  # not before an optimizer step may have waited for the copy
    ours = [step(engine, 2), step(engine, 3)]
    engine.save_checkpoint(root, tag="named")
    ours.append(step(engine, 4))
    engine.destroy()
    with open(f"{root}/latest") as file:
        assert file.read() == "named"

    again = made(2, via)
    path, client = again.load_checkpoint(root, tag="global_step1")
    assert client["note"] == [1, "x"]
    assert again.global_steps == 1
    theirs = [step(again, 2), step(again, 3)]
    assert again.load_checkpoint(root)[0].endswith("named/mp_rank_00_model_states.pt")
    theirs.append(step(again, 4))
    again.destroy()
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True)), str(path)


@pytest.mark.slow
@pytest.mark.parametrize("via", ["line", "config"])
def test_deepspeed_trains_on_bit_by_bit_from_what_was_saved_beside_it(tmp_path, via):
    root = tmp_path / "ds"
    results = run_ranks(rank_trains, 2, str(root), via, timeout_s=240, fresh=True, env=ENV)
    assert [equal for equal, _ in results] == [True, True]
    assert json.loads((root / "named" / "mp_rank_00_model_states.pt").read_text()) == {
        "longrail_checkpoint": {"step": 2, "file": "named/mp_rank_00_model_states.pt"}
    }
    back = Flat({})
    with Checkpointer(root, group=SINGLE) as checkpoints:  # and it is a checkpoint as any other
        assert checkpoints.restore(back, step=1).step == 1
    assert back.loaded["global_step1/mp_rank_00_model_states.pt.module.a.weight"].dtype is torch.bfloat16


def rank_seam(info, root):
    """The calls DeepSpeed makes, without its engine."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo

    from checkpointing.adapters.deepspeed import LongrailCheckpointEngine
    from checkpointing.errors import CheckpointError

    engine = LongrailCheckpointEngine()
    weight = torch.full((300, 100), float(info.rank))
    info_of = CheckpointCommitInfo("global_step5", root, True)
    engine.create(info_of)
    path = f"{root}/global_step5/zero_pp_rank_{info.rank}_mp_rank_00_optim_states.pt"
    engine.save({"optimizer_state_dict": {"w": weight, "betas": (0.9, 0.99)}, "ds_version": "0"}, path)
    assert engine.is_decoupled()
    assert engine.get_commit_info() is info_of
    engine.commit(info_of)
    weight += 1  # after the wait of `step`, weights may change
    engine.create(CheckpointCommitInfo("global_step5", root, True))  # and now it is durable
    loaded = engine.load(path, map_location=torch.device("cpu"))
    with open(f"{root}/latest") as file:
        latest = file.read()
    assert latest == "global_step5", f"latest holds {latest!r}"
    engine.save({"module": {"w": weight}}, path)
    engine.is_decoupled()  # the same tag again
    told = ""
    try:
        engine.cleanup()
    except CheckpointError as error:
        told = str(error)
    again = LongrailCheckpointEngine()  # of the next job, which loads and goes on
    again.load(path)
    again.create(CheckpointCommitInfo("global_step6", root, True))
    again.save({"module": {"w": weight}}, path.replace("global_step5", "global_step6"))
    again.is_decoupled()
    again.cleanup()
    return loaded, told, refused_and_alone(LongrailCheckpointEngine(), CheckpointCommitInfo, root, info.rank)


def test_only_one_writes_latest(tmp_path):
    """Rank 0 clears up behind a durable save, at the same time as the engine writes the tag."""
    for name in ("ours", "theirs"):
        with Checkpointer(tmp_path / name, group=SINGLE) as run:
            if name == "theirs":
                run.leave_latest()
            run.save(5, Flat({"w": torch.ones(3)})).wait()
    assert (tmp_path / "ours" / "latest").read_text() == "step-5\n"
    assert not (tmp_path / "theirs" / "latest").exists()


def refused_and_alone(engine, info_of, root, rank):
    """A checkpoint of which one file is refused, on rank 0; then a lone model for other tools, which rank 0 writes."""
    from checkpointing.errors import CheckpointError

    told, place = [], f"{root}-2"
    for step in (7, 8):
        engine.create(info_of(f"global_step{step}", place, True))
        try:
            engine.save({"module": {"w": torch.ones(70_000)}}, f"{place}/global_step{step}/r{rank}_model_states.pt")
            odd = {"client": object()} if (rank, step) == (0, 7) else {"client": 1}
            engine.save(odd, f"{place}/global_step{step}/r{rank}_optim_states.pt")
            engine.is_decoupled()
            engine._finish()  # as the next `create` does
        except CheckpointError as error:
            told.append(str(error))
        engine.is_decoupled()  # as the next `step` asks; what was refused is not begun in part
        engine.commit(engine.get_commit_info())
    alone = info_of("global_step9", place, False)
    engine.create(alone)
    if rank == 0:
        engine.save({"w": torch.ones(3).bfloat16()}, f"{place}/pytorch_model.bin")
    engine.commit(alone)
    engine.is_decoupled()
    engine.cleanup()
    return told


def test_the_seam_step_waits_for_the_copy_and_latest_for_the_disk(tmp_path):
    results = run_ranks(rank_seam, 2, str(tmp_path / "ds"), timeout_s=150, fresh=True, env=ENV)
    for rank, (loaded, error, refused) in enumerate(results):
        assert len(refused) == 1
        assert "save of step 7 failed: rank 0: " in refused[0]
        assert "client' is of type builtins.object" in refused[0]
        assert loaded["optimizer_state_dict"]["betas"] == (0.9, 0.99)
        assert same(loaded["optimizer_state_dict"]["w"], torch.full((300, 100), float(rank)))
        assert "step-5 exists already, and a save never overwrites" in error
    manifests = [json.loads((tmp_path / "ds" / f"step-{step}" / "manifest.json").read_text()) for step in (5, 6)]
    assert manifests[0]["run_id"] == manifests[1]["run_id"]  # retention counts them together
    second = tmp_path / "ds-2"
    assert sorted(path.name for path in second.iterdir()) == ["global_step8", "latest", "pytorch_model.bin", "step-8"]
    assert same(torch.load(second / "pytorch_model.bin"), {"w": torch.ones(3).bfloat16()})


class Trap:
    """What a pickle could do to whoever loads it."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def rank_loads_foreign(info, root):
    """Files that torch.save wrote, as DeepSpeed's own engine does: a harmless one, and one that would execute."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    from checkpointing.adapters.deepspeed import LongrailCheckpointEngine
    from checkpointing.errors import IntegrityError

    engine = LongrailCheckpointEngine()
    torch.save({"w": torch.ones(3), "scaler": LossScaler(2.0)}, f"{root}/plain.pt")
    torch.save({"w": Trap(f"{root}/executed")}, f"{root}/trap.pt")
    loaded = engine.load(f"{root}/plain.pt")
    with pytest.raises(IntegrityError, match="was not written by this engine, and holds more than tensors"):
        engine.load(f"{root}/trap.pt")
    return loaded["w"], loaded["scaler"].cur_scale


def test_nothing_of_a_foreign_file_executes(tmp_path):
    weight, scale = run_ranks(rank_loads_foreign, 1, str(tmp_path), timeout_s=150, fresh=True, env=ENV)[0]
    assert same(weight, torch.ones(3))
    assert scale == 2.0
    assert not (tmp_path / "executed").exists()
