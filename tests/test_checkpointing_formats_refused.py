"""What is no checkpoint, would execute, leaves its folder, or cannot be written: one clear error, and nothing left."""

import json
import pickle

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.errors import CheckpointError, FormatError, IntegrityError
from checkpointing.formats import detect, open_source, write_target
from checkpointing.formats.base import FILES
from tests.flat_states import Flat, read_source


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
            read_source(path)
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
        read_source(tmp_path / "s")
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    (tmp_path / "h" / "x.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="not a file in the folder"):
        read_source(tmp_path / "h")


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
