"""Other tools' checkpoints in and out: what the real library wrote is read, and it reads what we write."""

import os
import subprocess
import sys

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.adapters.torchsnapshot import AppState
from checkpointing.convert import save_source
from checkpointing.errors import FormatError
from checkpointing.formats import open_source, write_target
from checkpointing.formats.base import FILES
from checkpointing.values import leaves
from tests.flat_states import Flat, read_source, same
from tests.spawn import ROOT
from tests.tiny import tiny_model


def trained():
    """A small model and its optimizer after a step."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def flat(model, optimizer):
    """A training state as ours are: names of parameters, not numbers."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"optim.{name}.{slot}": value for slot, value in optimizer.state[parameter].items()}
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    names = [name for name, _ in model.named_parameters()]
    return state | {"optim_groups": [{**settings, "betas": [0.8, 0.9], "params": names}], "progress": {"step": 1}}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    with Checkpointer(root, group=SINGLE) as ckpt:
        ckpt.save(4, Flat(flat(*trained()))).wait()
    return root


def test_hugging_face_folders_go_in_and_out(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(tie_word_embeddings=True, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    source, tensors = read_source(tmp_path / "hf")
    assert source.kind == "hf"
    assert same(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight.detach())
    assert f"{FILES}config.json" in tensors
    save_source(source, tmp_path / "run", None, lambda _: None)
    write_target("hf", open_source(tmp_path / "run"), tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_a_large_hugging_face_folder_has_shards_and_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpointing.formats.hf._SHARD_BYTES", 20_000)
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf")
    write_target("hf", open_source(tmp_path / "hf"), tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert len({file.stat().st_mode for file in (tmp_path / "back").iterdir()}) == 1  # who may read one reads all
    assert same(read_source(tmp_path / "back")[1], read_source(tmp_path / "hf")[1])
    (tmp_path / "snapshot").mkdir()  # as the Hub's cache has them
    for file in (tmp_path / "hf").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert same(read_source(tmp_path / "snapshot")[1], read_source(tmp_path / "hf")[1])
    one = next((tmp_path / "back").glob("model-00002*"))
    one.unlink()
    with pytest.raises(FormatError, match=f"names {one.name}, which is missing"):
        open_source(tmp_path / "back")


def test_the_model_of_a_training_state_becomes_a_hugging_face_folder(run_folder, tmp_path):
    notes = []
    write_target("hf", open_source(run_folder), tmp_path / "hf", note=notes.append)
    assert notes == ["the checkpoint has no config.json and no tokenizer; copy them from the base model"]
    assert same(read_source(tmp_path / "hf")[1], dict(trained()[0].state_dict()))


def test_torch_files_keep_their_structure(tmp_path):
    model, optimizer = trained()
    state = {"net": model.state_dict(), "opt": optimizer.state_dict(), "rng": torch.get_rng_state(), "n": (1, [2.5])}
    torch.save(state, tmp_path / "a.pt")
    save_source(open_source(tmp_path / "a.pt"), tmp_path / "run", 3, lambda _: None)
    write_target("torch", open_source(tmp_path / "run"), tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(back["opt"]["state"]) == [*range(6)]  # numbers stay numbers
    assert back["n"] == (1, [2.5])
    optimizer.load_state_dict(back["opt"])
    assert same(back["net"], dict(state["net"]))


def test_a_tensor_may_be_called_as_we_call_the_tree(tmp_path):
    state = {"tree": torch.ones(3), "tree.x": 1, "a": {"tree": torch.zeros(2)}}
    torch.save(state, tmp_path / "a.pt")
    save_source(open_source(tmp_path / "a.pt"), tmp_path / "run", 1, lambda _: None)
    write_target("torch", open_source(tmp_path / "run"), tmp_path / "b.pt")
    assert same(torch.load(tmp_path / "b.pt"), state)


def test_dcp_in(tmp_path):
    import torch.distributed.checkpoint as dcp

    model, optimizer = trained()
    note = {"a": (1, 2), "t": torch.ones(2)}
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict(), "note": note}, checkpoint_id=tmp_path / "d")
    source, tensors = read_source(tmp_path / "d")
    assert source.kind == "dcp"
    assert same({n: tensors[f"model.{n}"] for n in model.state_dict()}, dict(model.state_dict()))
    assert source.values["note.a"] == {"$tuple": [1, 2]}
    save_source(source, tmp_path / "run", 1, lambda _: None)
    assert same(read_source(tmp_path / "run")[1], tensors)


def test_dcp_out_is_read_by_dcp(run_folder, tmp_path):
    import torch.distributed.checkpoint as dcp

    write_target("dcp", open_source(run_folder), tmp_path / "d", world_size=3)
    assert len(list((tmp_path / "d").glob("*.distcp"))) == 3
    expected = flat(*trained())
    state = {name: torch.zeros_like(value) for name, value in expected.items() if torch.is_tensor(value)}
    dcp.load(state, checkpoint_id=tmp_path / "d")
    assert same(state, {name: expected[name].detach() for name in state})


def test_torchsnapshot_in_and_out(run_folder, tmp_path):
    import torchsnapshot

    model, optimizer = trained()
    progress = torchsnapshot.StateDict(step=3, rate=0.1, on=True, note=(1, None), text="x/y")
    torchsnapshot.Snapshot.take(str(tmp_path / "s"), {"model": model, "optim": optimizer, "progress": progress})
    source, tensors = read_source(tmp_path / "s")
    assert same({n: tensors[f"model.{n}"] for n in model.state_dict()}, dict(model.state_dict()))
    values = {name: value for name, value in leaves(source.values) if name.startswith("progress.")}
    assert values == {
        "progress.step": 3, "progress.rate": 0.1, "progress.on": True, "progress.text": "x/y",
        "progress.note": [1, None],
    }  # fmt: skip
    write_target("torchsnapshot", open_source(run_folder), tmp_path / "back")
    other, _ = trained()
    with torch.no_grad():
        other[0].weight.zero_()
    torchsnapshot.Snapshot(str(tmp_path / "back")).restore({"model": other})
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_torchsnapshot_comes_back_as_it_was_nested(tmp_path):
    """The state of an optimizer is nested: torchsnapshot, torch, DCP and AppState get it as it was."""
    import torchsnapshot

    model, optimizer = trained()
    extra = {"odd/key%": [1, {"x": (2, torch.ones(3))}], "none": None}
    app = {"model": model, "optim": optimizer, "extra": torchsnapshot.StateDict(**extra)}
    torchsnapshot.Snapshot.take(str(tmp_path / "s"), app)
    run = tmp_path / "run"
    save_source(open_source(tmp_path / "s"), run, None, lambda _: None)
    write_target("torchsnapshot", open_source(run), tmp_path / "back")
    write_target("torch", open_source(run).only("optim.*"), tmp_path / "o.pt")
    write_target("dcp", open_source(run), tmp_path / "dcp")
    assert set(open_source(tmp_path / "dcp").tensors) == set(open_source(run).tensors)
    group = torch.load(tmp_path / "o.pt", weights_only=True)["optim"]["param_groups"][0]
    assert group == optimizer.state_dict()["param_groups"][0]

    def check(restore):
        other, fresh = trained()[0], torchsnapshot.StateDict(**{"odd/key%": 0, "none": 0})
        again = torch.optim.AdamW(other.parameters(), lr=7.0)
        restore({"model": other, "optim": again, "extra": fresh})
        assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        old, new = optimizer.state_dict()["state"], again.state_dict()["state"]
        assert old.keys() == new.keys()
        assert all(same(dict(old[key]), dict(new[key])) for key in old)
        assert (fresh["odd/key%"][0], fresh["none"]) == (1, None)
        assert torch.equal(fresh["odd/key%"][1]["x"][1], torch.ones(3))

    check(torchsnapshot.Snapshot(str(tmp_path / "back")).restore)
    with Checkpointer(run, group=SINGLE) as ckpt:
        check(lambda app: ckpt.restore(AppState(app)))


@pytest.mark.parametrize("names", [("model.a", "lm_head"), ("a", "b")])
def test_a_model_without_an_optimizer_keeps_its_names_for_deepspeed(tmp_path, names):
    from safetensors.torch import save_file

    tensors = {name: torch.randn(3, 2) for name in names}
    (tmp_path / "hf").mkdir()
    save_file(tensors, str(tmp_path / "hf" / "model.safetensors"))
    write_target("deepspeed", open_source(tmp_path / "hf"), tmp_path / "ds", world_size=2)
    (file,) = (tmp_path / "ds").glob("*/mp_rank_00_model_states.pt")
    assert same(dict(torch.load(file, weights_only=False)["module"]), tensors)
    write_target("hf", open_source(tmp_path / "ds"), tmp_path / "again")
    assert same(read_source(tmp_path / "again")[1], tensors)


DEEPSPEED = """
import sys, torch, deepspeed
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
stage, out, back = int(sys.argv[1]), sys.argv[2], sys.argv[3]
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
net.register_buffer("seen", torch.arange(3.0))
engine = deepspeed.initialize(model=net, config={
    "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
})[0]
def step():
    torch.manual_seed(engine.global_steps * 2 + torch.distributed.get_rank())
    loss = engine(torch.randn(4, 8).bfloat16()).float().pow(2).mean()
    engine.backward(loss)
    engine.step()
if back == "-":
    step(); step()
    engine.save_checkpoint(out)
    step()
    engine.save_checkpoint(out, tag="after")
else:
    assert engine.load_checkpoint(back)[0] is not None
    step()
    engine.save_checkpoint(out, tag="again")
"""


def deepspeed_job(tmp_path, *args):
    script = tmp_path / "job.py"
    script.write_text(DEEPSPEED)
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *args],
        cwd=ROOT, capture_output=True, text=True, timeout=170,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_in_and_out_and_on_with_deepspeed(tmp_path, stage):
    """Ours, written back for two ranks, trains on in DeepSpeed bit by bit as if it had never been away."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deepspeed_job(tmp_path, str(stage), str(tmp_path / "ds"), "-")
    source, tensors = read_source(tmp_path / "ds" / "global_step2")
    assert (source.kind, source.step) == ("deepspeed", 2)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"), "global_step2")
    for name, tensor in theirs.items():
        if name != "seen":
            assert same(tensors[f"optim.{name}.fp32"], tensor.contiguous())
    save_source(source, tmp_path / "run", None, lambda _: None)
    write_target("deepspeed", open_source(tmp_path / "run"), tmp_path / "back", world_size=2)
    assert same(read_source(tmp_path / "back")[1], tensors)
    if stage == 1:
        deepspeed_job(tmp_path, "1", str(tmp_path / "ds"), str(tmp_path / "back"))
        assert same(read_source(tmp_path / "ds" / "again")[1], read_source(tmp_path / "ds" / "after")[1])


@pytest.mark.slow
def test_zero_checkpoints_of_a_training_state_are_read_by_deepspeed(run_folder, tmp_path):
    code = (
        "import sys, torch\n"
        "from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merged\n"
        "torch.save({n: t.clone() for n, t in merged(sys.argv[1]).items()}, sys.argv[2])"
    )
    write_target("deepspeed", open_source(run_folder), tmp_path / "ds", world_size=3)
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    out = tmp_path / "merged.pt"
    found = subprocess.run([sys.executable, "-c", code, tmp_path / "ds", out], capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr[-3000:]
    merged = torch.load(out, weights_only=True)
    model = trained()[0]
    for name, parameter in model.named_parameters():
        assert same(merged[name], parameter.detach())
    assert same(
        {n: t for n, t in read_source(tmp_path / "ds")[1].items() if "exp_avg" in n},
        {n: t for n, t in flat(*trained()).items() if "exp_avg" in n},
    )
