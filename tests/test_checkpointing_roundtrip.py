"""One process: what is saved comes back bit by bit, and any tool can read the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepLast
from checkpointing.torch_dtypes import DTYPES
from tests.flat_states import Flat, assorted, same

GOLDEN = Path(__file__).parent / "data" / "checkpoint-v1"


def saved(path: Path, state: object, step: int = 1) -> Path:
    with Checkpointer(path, group=SINGLE) as ckpt:
        return ckpt.save(step, state).wait()


def loaded(path: Path, prefix: str = "run") -> dict:
    with Checkpointer(path, group=SINGLE) as ckpt:
        flat = Flat({})
        assert ckpt.restore({prefix: flat}) is not None
    assert flat.loaded is not None
    return flat.loaded


def test_everything_comes_back_bit_by_bit(tmp_path):
    state = assorted()
    place = saved(tmp_path / "not" / "there", {"run": Flat(state)}, step=7)
    assert place == tmp_path / "not" / "there" / "step-7"
    assert same(state, loaded(tmp_path / "not" / "there"))


def test_a_lone_stateful_has_no_prefix(tmp_path):
    saved(tmp_path, Flat({"a": torch.ones(2), "b.c": 1}))
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        back = Flat({})
        ckpt.restore(back)
    assert same(back.loaded, {"a": torch.ones(2), "b.c": 1})


def test_a_module_is_a_state_and_tied_weights_are_written_once(tmp_path):
    def model():
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    torch.manual_seed(1)
    old, new = model(), model()
    place = saved(tmp_path, {"model": old})
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.restore({"model": new})
    assert same(dict(old.state_dict()), dict(new.state_dict()))
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["aliases"] == {"model.2.weight": "model.0.weight"}
    assert "model.2.weight" not in load_file(place / "rank-00000.safetensors")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_in_every_shape(tmp_path, name):
    dtype = DTYPES[name]
    shapes = [(3, 4), (0, 2), (1,)] + ([] if name == "F4" else [()])
    raw = {
        str(shape): torch.randint(0, 2, (*shape[:-1], shape[-1] * dtype.itemsize) if shape else (dtype.itemsize,))
        for shape in shapes
    }
    state = {
        key: value.to(torch.uint8).view(dtype).reshape(shape)
        for (key, value), shape in zip(raw.items(), shapes, strict=True)
    }
    place = saved(tmp_path, {"run": Flat(state)})
    assert same(state, loaded(tmp_path))
    with safe_open(place / "rank-00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(f"run.{key}" for key in state)
        if name not in ("F4", "F8_E8M0"):  # the library of today writes these two and cannot give them to torch
            assert same({key: file.get_tensor(f"run.{key}") for key in state}, state)


def test_the_file_reads_as_safetensors_and_the_manifest_as_json(tmp_path):
    state = assorted()
    place = saved(tmp_path, {"run": Flat(state)})
    tensors = load_file(place / "rank-00000.safetensors")
    expected = {f"run.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    del expected["run.weight"]  # the alias of head.weight, which sorts before it
    assert same(dict(sorted(expected.items())), dict(sorted(tensors.items())))
    raw = (place / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    assert manifest["format_version"] == 2
    assert manifest["xxh3_64"] == xxhash.xxh3_64_hexdigest(raw[len('{"xxh3_64":"0123456789abcdef",') :])
    data = (place / "rank-00000.safetensors").read_bytes()
    (file,) = manifest["files"]
    head = 8 + int.from_bytes(data[:8], "little")
    assert (file["path"], file["length"], file["head_bytes"]) == ("rank-00000.safetensors", len(data), head)
    assert file["xxh3_64"] == xxhash.xxh3_64_hexdigest(data[:head])
    placed = sorted((entry["begin"], entry["end"]) for entry in manifest["tensors"] if entry["begin"] < entry["end"])
    assert file["pieces"] == "".join(xxhash.xxh3_64_hexdigest(data[begin:end]) for begin, end in placed)


def test_tensors_are_aligned_to_their_elements(tmp_path):
    place = saved(tmp_path, {"run": Flat(assorted())})
    for entry in json.loads((place / "manifest.json").read_text())["tensors"]:
        assert entry["begin"] % DTYPES[entry["dtype"]].itemsize == 0


def test_nothing_is_created_before_the_first_save(tmp_path):
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        assert ckpt.restore(Flat({})) is None
        assert (ckpt.latest(), ckpt.steps()) == (None, [])
        ckpt.fence()
    assert not (tmp_path / "run").exists()


def test_every_saved_name_is_given_and_other_prefixes_are_left_alone(tmp_path, caplog):
    saved(tmp_path, {"model": Flat({"w": torch.ones(1)}), "modeling": Flat({"w": 2}), "optim": Flat({"w.exp_avg": 3})})
    assert same(loaded(tmp_path, "model"), {"w": torch.ones(1)})
    assert same(loaded(tmp_path, "optim"), {"w.exp_avg": 3})
    assert not caplog.records
    assert same(loaded(tmp_path, "absent"), {})
    assert "nothing was saved under 'absent'; step 1 has names like 'model.w'" in caplog.text


def test_an_alias_whose_other_name_is_not_asked_for(tmp_path):
    shared = torch.arange(3.0)
    saved(tmp_path, {"a": Flat({"w": shared}), "b": Flat({"w": shared})})
    assert same(loaded(tmp_path, "b"), {"w": shared})
    assert same(loaded(tmp_path, "a"), {"w": shared})


def test_steps_are_numbers_and_old_ones_go(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(2)) as ckpt:
        for step in (9, 10, 100):
            ckpt.save(step, Flat({"step": step})).wait()
    assert (tmp_path / "latest").read_text() == "step-100\n"
    assert (ckpt.steps(), ckpt.latest()) == ([10, 100], 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-100"]


def test_a_save_below_an_abandoned_step_stays(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE, keep=KeepLast(1)) as ckpt:
        for step in (100, 5, 6):
            assert ckpt.save(step, Flat({"step": step})).wait().is_dir()
    assert ckpt.steps() == [6, 100]  # pruned behind the save, before the close
    assert (tmp_path / "latest").read_text() == "step-100\n"  # what a restore takes


def test_a_later_process_continues_the_run(tmp_path):
    first = json.loads((saved(tmp_path, Flat({"a": 1}), step=1) / "manifest.json").read_text())
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.restore(Flat({}))
        second = json.loads((ckpt.save(2, Flat({"a": 1})).wait() / "manifest.json").read_text())
    assert first["run_id"] == second["run_id"]


def test_checkpoints_of_another_run_are_never_pruned(tmp_path):
    saved(tmp_path / "a", Flat({"a": 1}), step=1)
    saved(tmp_path / "b", Flat({"a": 2}), step=2)
    (tmp_path / "a" / "step-1").rename(tmp_path / "b" / "step-1")
    with Checkpointer(tmp_path / "b", group=SINGLE, keep=KeepLast(1)) as ckpt:
        ckpt.restore(Flat({}))
        ckpt.save(3, Flat({"a": 3})).wait()
    assert ckpt.steps() == [1, 3]


def test_an_exact_step_can_be_asked_for(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"run": Flat({"step": step})}).wait()
        back = Flat({})
        info = ckpt.restore({"run": back}, step=1)
        assert info is not None
        assert (info.step, info.path, info.skipped, back.loaded) == (1, tmp_path / "step-1", (), {"step": 1})
        with pytest.raises(CheckpointError, match=r"no step 3 in .*; there are: \[1, 2\]"):
            ckpt.restore(Flat({}), step=3)
        for step in (True, 1.0, "1", np.int64(1)):
            with pytest.raises(CheckpointError, match="it must be an int from 0 to"):
                ckpt.restore(Flat({}), step=step)


def test_latest_is_only_a_hint(tmp_path):
    saved(tmp_path, {"run": Flat({"a": 1})}, step=4)
    (tmp_path / "latest").write_text("step-99\n")
    assert loaded(tmp_path) == {"a": 1}


def test_a_save_never_overwrites(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(5, {"run": Flat({"a": 1})}).wait()
        with pytest.raises(CheckpointError, match="step-5 exists already, and a save never overwrites"):
            ckpt.save(5, {"run": Flat({"a": 2})}).wait()
    assert loaded(tmp_path) == {"a": 1}


def test_the_handle_tells_how_far_it_is(tmp_path):
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        handle = ckpt.save(5, Flat({"a": torch.zeros(1000)}))
        handle.staged(1.0)
        assert handle.wait(1.0) == tmp_path / "step-5"
        size = (tmp_path / "step-5" / "rank-00000.safetensors").stat().st_size
        assert (handle.progress.written_bytes, handle.progress.total_bytes, handle.progress.done) == (size, size, True)


def test_closed_is_closed(tmp_path):
    ckpt = Checkpointer(tmp_path, group=SINGLE)
    ckpt.close()
    ckpt.close()
    with pytest.raises(CheckpointError, match="this checkpointer is closed"):
        ckpt.save(1, Flat({"a": 1}))


def test_under_torchrun_without_a_group_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with pytest.raises(CheckpointError, match="init_process_group"):
        Checkpointer(tmp_path)
    Checkpointer(tmp_path, group=SINGLE).close()


def test_bad_arguments_are_refused(tmp_path):
    for kwargs, text in [
        ({"group": "alone"}, "group is 'alone'"),
        ({"group": SINGLE, "keep": 3}, r"keep is 3; give a retention rule, for example KeepLast\(3\)"),
        ({"group": SINGLE, "timeout_s": 0}, "timeout_s is 0"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            Checkpointer(tmp_path, **kwargs)


def golden_state() -> dict:
    """What is in tests/data/checkpoint-v1; spelled out, so that no library's generator can change it."""
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "w": shared,
        "tied": shared,
        "bf16": torch.arange(5).to(torch.bfloat16) / 4,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "value": {"list": [1, 2.5, None, True, "x"], "$key": float("inf")},
    }


def test_format_1_loads_for_ever():
    assert same(golden_state(), loaded(GOLDEN))
