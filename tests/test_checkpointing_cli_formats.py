"""`checkpoint save` and `checkpoint restore`: what other tools wrote, and what they are given."""

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from tests.checkpoint_commands import DATA, copied, run, run_json, two_steps
from tests.flat_states import Flat, assorted, same


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 10 and 20; tests that change it copy it."""
    return two_steps(tmp_path_factory.mktemp("runs") / "a")


def test_restore_only_a_part_in_another_dtype_and_never_over_something(saved, tmp_path):
    run("restore", f"{saved}@10", tmp_path / "a.pt", "--format", "torch", "--only", "run.page", "--dtype", "bfloat16")
    back = torch.load(tmp_path / "a.pt", weights_only=True)
    assert same(back, {"run.page": assorted(10)["page"].bfloat16()})
    _, text = run("restore", saved, tmp_path / "a.pt", "--format", "torch", ok=(2,))
    assert text == f"{tmp_path}/a.pt exists already and nothing is overwritten; choose another destination"
    for extra, text in (
        (("--only", "x*"), "no name of"),
        (("--dtype", "int8"), "--dtype int8 is no floating-point dtype of torch"),
        (("--format", "zip"), "format 'zip' is unknown; formats: "),
        (("--world-size", "2"), "--world-size 2 has no meaning for torch, only for dcp and deepspeed"),
        (("--format", "hf", "--world-size", "2"), "--world-size 2 has no meaning for hf"),
        (("--format", "torchsnapshot", "--world-size", "3"), "--world-size 3 has no meaning for torchsnapshot"),
    ):
        format_ = () if "--format" in extra else ("--format", "torch")
        assert text in run("restore", saved, tmp_path / "b", *format_, *extra, ok=(2,))[1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]  # nothing half-made is left


def test_restore_verifies_what_it_reads(saved, tmp_path):
    root = copied(saved, tmp_path)
    data = bytearray((root / "step-20" / DATA).read_bytes())
    data[-1] ^= 1
    (root / "step-20" / DATA).write_bytes(data)
    _, text = run("restore", root, tmp_path / "x.pt", "--format", "torch", ok=(1,))
    assert "is not what was saved" in text
    assert not (tmp_path / "x.pt").exists()
    for two in ((root, saved), (saved, root)):  # the same names in both
        assert f"{root}/step-20/{DATA}: tensor" in run("diff", *two, ok=(1,))[1]


def test_what_is_damaged_is_not_offered_instead(saved, tmp_path):
    root = copied(saved, tmp_path)
    with Checkpointer(root, group=SINGLE) as ckpt:
        ckpt.adopt(20)
        ckpt.save(30, {"run": Flat(assorted(3))}).wait()
    for step, other in ((30, "; another step: {root}@20"), (20, "; another step: {root}@10"), (10, "")):
        data = bytearray((root / f"step-{step}" / DATA).read_bytes())
        data[-1] ^= 1
        (root / f"step-{step}" / DATA).write_bytes(data)
        _, text = run("restore", root, tmp_path / "x.pt", "--format", "torch", ok=(1,))
        assert "step-30" in text.partition("; another step")[0]
        assert text.endswith(other.format(root=root))
        assert ("another" in text) == bool(other)


def test_a_torch_file_needs_no_suffix_to_be_read(saved, tmp_path):
    run("restore", f"{saved}@10", tmp_path / "out", "--format", "torch", "--only", "run.page")
    assert run_json("show", tmp_path / "out")["format"] == "torch"
    run("save", tmp_path / "out", tmp_path / "back")
    (tmp_path / "other").write_bytes(b"P")
    _, text = run("show", tmp_path / "other", ok=(2,))
    assert f"{tmp_path}/other is a file we cannot tell by its name or beginning" in text


def test_save_commits_what_another_tool_wrote(tmp_path):
    nested = {"model": {"w": torch.randn(3)}, "optimizer": {"state": {0: {"step": 1}}, "betas": (0.9, 0.95)}}
    torch.save(nested, tmp_path / "old.pt")
    found = run_json("save", tmp_path / "old.pt", tmp_path / "run", "--step", 7)
    assert found["path"].endswith("run/step-7")
    assert run("verify", tmp_path / "run")[0] == 0
    run("restore", tmp_path / "run", tmp_path / "new.pt", "--format", "torch")
    assert same(torch.load(tmp_path / "new.pt", weights_only=True), nested)
    run("save", tmp_path / "old.pt", tmp_path / "run", "--step", 3)  # into the same run
    assert {one["level"] for one in run_json("doctor", tmp_path / "run")} == {"ok"}
    assert "step-7 exists already" in run("save", tmp_path / "old.pt", tmp_path / "run", "--step", 7, ok=(2,))[1]


STATE = {
    "model.a.weight": torch.randn(6, 4), "model.a.bias": torch.randn(6), "optim.a.weight.exp_avg": torch.randn(6, 4),
    "optim.a.bias.exp_avg": torch.randn(6), "optim.a.weight.exp_avg_sq": torch.randn(6, 4).abs(),
    "optim.a.bias.exp_avg_sq": torch.randn(6).abs(), "optim.a.weight.step": torch.tensor(3.0),
    "optim.a.bias.step": torch.tensor(3.0), "progress": {"step": 3},
    "optim_groups": [{"lr": 0.1, "params": ["a.weight", "a.bias"]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("format_", "ranks"), [("hf", 1), ("torch", 1), ("dcp", 3), ("deepspeed", 2), ("torchsnapshot", 1)]
)
def test_every_format_is_written_in_part_in_another_dtype_and_for_other_ranks(tmp_path, recwarn, format_, ranks):
    """What was written is read again: the model alone, in the dtype that was asked for."""
    if format_ == "torchsnapshot":
        pytest.importorskip("torchsnapshot")
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        ckpt.save(3, Flat(STATE)).wait()
    size = ("--world-size", ranks) if ranks > 1 else ()
    flags = ("--format", format_, *size, "--dtype", "bfloat16", "--only", "model.*")
    part = tmp_path / ("part.pt" if format_ == "torch" else "part")
    done = run_json("restore", f"{tmp_path}/run@3", part, *flags)
    assert done["format"] == format_
    assert not [one for one in recwarn if "torch.distributed" in str(one.message)]  # DCP's, of writing alone
    run("save", part, tmp_path / "back")
    back = Flat({})
    with Checkpointer(tmp_path / "back", group=SINGLE) as ckpt:
        ckpt.restore(back)
    found = {name.rpartition("a.")[2]: one for name, one in back.loaded.items() if torch.is_tensor(one)}
    assert same(found["weight"], STATE["model.a.weight"].bfloat16())
    assert same(found["bias"], STATE["model.a.bias"].bfloat16())
    assert not any("exp_avg" in name for name in back.loaded)


def test_the_model_of_a_training_state_under_a_prefix_is_found(tmp_path):
    first = {"model.fc.weight": torch.ones(2, 3), "optim.fc.weight.exp_avg": torch.zeros(2, 3), "optim_class": "AdamW"}
    with Checkpointer(tmp_path / "one", group=SINGLE) as ckpt:
        ckpt.save(1, {"train": Flat(first), "ema": Flat({"fc.weight": torch.zeros(2, 3)})}).wait()
    run("restore", tmp_path / "one", tmp_path / "hf", "--format", "hf")
    assert [one["name"] for one in run_json("show", tmp_path / "hf")["tensors"]] == ["fc.weight"]
    run("restore", tmp_path / "one", tmp_path / "part", "--format", "hf", "--only", "train.model.*")
    assert run("diff", tmp_path / "hf", tmp_path / "part")[1].strip() == "no differences"
    with Checkpointer(tmp_path / "two", group=SINGLE) as ckpt:
        ckpt.save(1, {"a": Flat(first), "b": Flat(first)}).wait()
    _, text = run("restore", tmp_path / "two", tmp_path / "none", "--format", "hf", ok=(2,))
    assert "2 training states; choose one of them: --only 'a.*' or --only 'b.*'" in text
    run("restore", tmp_path / "two", tmp_path / "b", "--format", "hf", "--only", "b.*")
    assert run("diff", tmp_path / "hf", tmp_path / "b")[1].strip() == "no differences"


@pytest.mark.parametrize("format_", ["dcp", "torchsnapshot"])
def test_a_nested_state_keeps_its_names_in_other_formats(tmp_path, format_):
    pytest.importorskip("torchsnapshot")
    tensors = {"model": {"0.weight": torch.ones(2, 3)}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    torch.save(tensors | {"step": 3}, tmp_path / "a.pt")
    run("save", tmp_path / "a.pt", tmp_path / "run")
    run("restore", tmp_path / "run", tmp_path / "out", "--format", format_)
    names = {one["name"] for one in run_json("show", tmp_path / "a.pt")["tensors"]}
    assert {one["name"] for one in run_json("show", tmp_path / "out")["tensors"]} == names


def test_a_newest_step_that_is_cut_is_passed_over_aloud(saved, tmp_path):
    runs = copied(saved, tmp_path)
    data = (runs / "step-20" / DATA).read_bytes()
    (runs / "step-20" / DATA).write_bytes(data[:-3])
    cases = (("restore", runs, tmp_path / "o.pt", "--format", "torch"), ("show", runs), ("save", runs, tmp_path / "c"))
    for args in cases:
        assert f"passed over, for step 10: step-20/{DATA}: " in run(*args)[1]
    assert run_json("show", runs)["step"] == 10
    assert "passed over" not in run("show", f"{runs}@10")[1]


def test_restore_of_a_damaged_run_names_another_step(saved, tmp_path):
    runs = copied(saved, tmp_path)
    data = bytearray((runs / "step-20" / DATA).read_bytes())
    data[-3] ^= 1
    (runs / "step-20" / DATA).write_bytes(data)
    assert f"another step: {runs}@10" in run("restore", runs, tmp_path / "o.pt", "--format", "torch", ok=(1,))[1]
