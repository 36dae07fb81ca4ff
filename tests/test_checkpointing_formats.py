"""Other tools' checkpoints in and out: what the real library wrote is read, and it reads what we write."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.adapters.torchsnapshot import AppState
from checkpointing.convert import save_source
from checkpointing.errors import CheckpointError, FormatError, IntegrityError
from checkpointing.formats import detect, open_source, write_target
from checkpointing.formats.base import FILES
from checkpointing.values import leaves
from tests.flat_states import Flat, same
from tests.spawn import ROOT
from tests.tiny import tiny_model


def read(path, step=None):
    source = open_source(path, step=step)
    tensors = {name: lazy.read() for name, lazy in source.tensors.items()}
    for name, lazy in source.tensors.items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (lazy.dtype, lazy.shape)
    return source, tensors


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
    from tests.flat_states import Flat

    root = tmp_path_factory.mktemp("run")
    with Checkpointer(root, group=SINGLE) as ckpt:
        ckpt.save(4, Flat(flat(*trained()))).wait()
    return root


def test_hugging_face_folders_go_in_and_out(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(tie_word_embeddings=True, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    source, tensors = read(tmp_path / "hf")
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
    assert same(read(tmp_path / "back")[1], read(tmp_path / "hf")[1])
    (tmp_path / "snapshot").mkdir()  # as the Hub's cache has them
    for file in (tmp_path / "hf").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert same(read(tmp_path / "snapshot")[1], read(tmp_path / "hf")[1])
    one = next((tmp_path / "back").glob("model-00002*"))
    one.unlink()
    with pytest.raises(FormatError, match=f"names {one.name}, which is missing"):
        open_source(tmp_path / "back")


def test_the_model_of_a_training_state_becomes_a_hugging_face_folder(run_folder, tmp_path):
    notes = []
    write_target("hf", open_source(run_folder), tmp_path / "hf", note=notes.append)
    assert notes == ["the checkpoint has no config.json and no tokenizer; copy them from the base model"]
    assert same(read(tmp_path / "hf")[1], dict(trained()[0].state_dict()))


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
    source, tensors = read(tmp_path / "d")
    assert source.kind == "dcp"
    assert same({n: tensors[f"model.{n}"] for n in model.state_dict()}, dict(model.state_dict()))
    assert source.values["note.a"] == {"$tuple": [1, 2]}
    save_source(source, tmp_path / "run", 1, lambda _: None)
    assert same(read(tmp_path / "run")[1], tensors)


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
    source, tensors = read(tmp_path / "s")
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
    assert same(read(tmp_path / "again")[1], tensors)


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
    source, tensors = read(tmp_path / "ds" / "global_step2")
    assert (source.kind, source.step) == ("deepspeed", 2)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"), "global_step2")
    for name, tensor in theirs.items():
        if name != "seen":
            assert same(tensors[f"optim.{name}.fp32"], tensor.contiguous())
    save_source(source, tmp_path / "run", None, lambda _: None)
    write_target("deepspeed", open_source(tmp_path / "run"), tmp_path / "back", world_size=2)
    assert same(read(tmp_path / "back")[1], tensors)
    if stage == 1:
        deepspeed_job(tmp_path, "1", str(tmp_path / "ds"), str(tmp_path / "back"))
        assert same(read(tmp_path / "ds" / "again")[1], read(tmp_path / "ds" / "after")[1])


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
        {n: t for n, t in read(tmp_path / "ds")[1].items() if "exp_avg" in n},
        {n: t for n, t in flat(*trained()).items() if "exp_avg" in n},
    )


class Harmful:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_that_would_run_code_are_refused_in_every_format(tmp_path):
    proof = tmp_path / "executed"
    bad = tmp_path / "bad"
    for kind in ("torch", "dcp", "dcp value", "deepspeed", "torchsnapshot", "longrail", "hf"):
        path = bad / kind.replace(" ", "_")
        path.mkdir(parents=True)
        if kind == "torch":
            path = path / "a.pt"
            torch.save({"x": Harmful(proof)}, path)
        elif kind == "dcp":
            (path / ".metadata").write_bytes(pickle.dumps(Harmful(proof)))
        elif kind == "dcp value":
            import torch.distributed.checkpoint as dcp

            dcp.save({"x": Harmful(proof)}, checkpoint_id=path)
        elif kind == "deepspeed":
            torch.save({"module": Harmful(proof)}, path / "mp_rank_00_model_states.pt")
        elif kind == "torchsnapshot":
            torch.save(Harmful(proof), path / "thing")
            entry = {"type": "object", "location": "thing", "serializer": "torch_save", "obj_type": "x"}
            (path / ".snapshot_metadata").write_text(json.dumps({"manifest": {"0/x": {**entry, "replicated": False}}}))
        elif kind == "longrail":
            path = path / "step-1"
            path.mkdir()
            (path / "manifest.json").write_bytes(pickle.dumps(Harmful(proof)))
        else:
            (path / "model.safetensors").write_bytes(pickle.dumps(Harmful(proof)))
        with pytest.raises(CheckpointError) as error:
            read(path)
        if kind not in ("longrail", "hf"):
            assert "refused, and nothing in it was executed" in str(error.value), kind
        assert not proof.exists(), kind


def test_places_outside_of_the_folder_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "secret").write_bytes(b"12345678")
    entry = {
        "type": "Tensor", "location": "../secret", "serializer": "buffer_protocol", "dtype": "torch.uint8",
        "shape": [8], "replicated": False,
    }  # fmt: skip
    (tmp_path / "s" / ".snapshot_metadata").write_text(json.dumps({"manifest": {"0/x": entry}}))
    with pytest.raises(FormatError, match="outside of the folder"):
        read(tmp_path / "s")
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    (tmp_path / "h" / "x.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="not a file in the folder"):
        read(tmp_path / "h")


@pytest.mark.parametrize("name", ["../evil", "/{tmp}/evil", "..", "", "a/b", "a\0b"])
def test_small_files_are_written_into_the_folder_and_nowhere_else(tmp_path, name):
    state = {"w": torch.ones(3), f"{FILES}{name.format(tmp=tmp_path)}": torch.ones(4, dtype=torch.uint8)}
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        ckpt.save(1, Flat(state)).wait()
    with pytest.raises(FormatError, match="does not name a file in the folder"):
        write_target("hf", open_source(tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("torch", {"w": torch.ones(3), "tree": {"$tuple": 5}}),
        ("torch", {"w": torch.ones(3), "tree": {"$tensor": "another"}}),
        ("dcp", {"w": torch.ones(3), "tree": {"$bytes": 5}}),
        ("torchsnapshot", {"w": torch.ones(3), "tree": {"$set": [[1]]}}),
        ("deepspeed", {"model.w": torch.ones(3), "optim.w.exp_avg": torch.ones(3), "deepspeed": {"groups": 5}}),
        ("deepspeed", {"model.w": torch.ones(3), "optim_groups": [{"params": ["another"]}]}),
    ],
)
def test_odd_contents_are_one_clear_error(tmp_path, kind, state):
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        ckpt.save(1, Flat(state)).wait()
    with pytest.raises((FormatError, IntegrityError), match=r"is not one this library writes|cannot be written as"):
        write_target(kind, open_source(tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("entry", [{"shape": [10**15]}, {"shape": ["x"]}, {"byte_range": [0, 10**15]}, {"location": 5}])
def test_odd_entries_of_another_tool_are_one_clear_error(tmp_path, entry):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "file").write_bytes(b"12345678")
    whole = {
        "type": "Tensor",
        "location": "file",
        "serializer": "buffer_protocol",
        "dtype": "torch.uint8",
        "shape": [8],
    }
    (tmp_path / "s" / ".snapshot_metadata").write_text(json.dumps({"manifest": {"0/x": whole | entry}}))
    with pytest.raises(FormatError):
        write_target("torch", open_source(tmp_path / "s"), tmp_path / "x.pt")


def test_what_no_format_is(tmp_path):
    with pytest.raises(FormatError, match="does not exist; give a checkpoint"):
        detect(tmp_path / "none")
    with pytest.raises(FormatError, match="is empty; give a checkpoint"):
        detect(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"is no checkpoint we know: it holds notes\.txt; formats: longrail, hf"):
        detect(tmp_path)
    with pytest.raises(FormatError, match="is a file we cannot tell"):
        detect(tmp_path / "notes.txt")


def test_odd_bf16_tensors_that_torchsnapshot_loses_are_refused(tmp_path):
    torch.save({"w": torch.ones(3).bfloat16()}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="torchsnapshot cannot hold 'w', bfloat16 of an odd number of elements"):
        write_target("torchsnapshot", open_source(tmp_path / "a.pt"), tmp_path / "s")
