"""The `checkpoint` command, run as people run it: as a process with arguments, output and an exit code."""

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from typer.testing import CliRunner

from checkpointing import SINGLE, Checkpointer, cli
from checkpointing.errors import CheckpointError, IntegrityError
from tests.flat_states import Flat, assorted, same
from tests.spawn import ROOT

DATA = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 10 and 20; tests that change it copy it."""
    root = tmp_path_factory.mktemp("runs") / "a"
    with Checkpointer(root, group=SINGLE) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"run": Flat(assorted(step))}).wait()
    return root


def run(*args, ok=(0,)):
    """Run a verb in this process, as `main` would; return (exit code, output)."""
    found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if isinstance(found.exception, CheckpointError):
        code, text = (1 if isinstance(found.exception, IntegrityError) else 2), str(found.exception)
    else:
        code, text = found.exit_code, found.output
    assert code in ok, text
    return code, text


def run_json(*args, ok=(0,)):
    found = CliRunner().invoke(cli.app, [*map(str, args), "--json"])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert found.exit_code in ok, found.output
    return json.loads(found.stdout)


def test_every_verb_has_help_and_json():
    for verb in ("ls", "show", "verify", "diff", "save", "restore", "request", "prune", "doctor"):
        text = run(verb, "--help")[1]
        assert "--json" in text


def test_verify_needs_no_torch_and_exits_1_on_damage(saved, tmp_path):
    place = copied(saved, tmp_path) / "step-20" / DATA
    body = json.loads((place.parent / "manifest.json").read_text())
    entry = next(one for one in body["tensors"] if one["name"] == "run.page")
    data = bytearray(place.read_bytes())
    data[entry["begin"] + 5] ^= 1
    place.write_bytes(data)
    code = (
        "import sys; sys.modules['torch'] = None; from checkpointing.cli import app\n"
        "for verb in ('verify', 'ls', 'show', 'doctor'):\n"
        "    try: app([verb, sys.argv[1]])\n"
        "    except SystemExit as done: print(verb, 'exits', done.code)"
    )
    found = subprocess.run([sys.executable, "-c", code, place.parents[1]], cwd=ROOT, capture_output=True, text=True)
    assert "step 10: every byte is what was saved" in found.stdout, found.stderr
    assert f"step-20/{DATA}: tensor 'run.page', piece 0 (bytes {entry['begin']}.." in found.stdout
    codes = dict(line.split(" exits ") for line in found.stdout.splitlines() if " exits " in line)
    assert codes == {"verify": "1", "ls": "0", "show": "0", "doctor": "0"}


def test_the_module_is_the_command_and_bad_input_exits_2(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "checkpointing", "verify", str(tmp_path / "none")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.strip() == (f"checkpoint: {tmp_path}/none does not exist; give the folder of a run")


@pytest.mark.parametrize(
    ("args", "shown"), [(["verify", "@20"], "step 20"), (["diff", "@10", "@20"], "comparing")], ids=["bytes", "names"]
)
def test_a_person_at_a_terminal_sees_a_bar_and_a_program_does_not(saved, args, shown):
    command = [sys.executable, "-m", "checkpointing", *(f"{saved}{one}" if one[0] == "@" else one for one in args)]
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=False)
    os.close(theirs)
    drawn = b""
    with suppress(OSError), os.fdopen(ours, "rb", 0) as screen:  # an error is how a terminal ends
        while part := screen.read(4096):
            drawn += part
    assert shown in drawn.decode()
    assert ("names" in drawn.decode()) == (args[0] == "diff")
    plain = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=60, check=False)
    assert plain.stderr == b""
    assert plain.stdout == done.stdout


def test_ls_and_show(saved):
    rows = run_json("ls", saved)
    assert [(row["step"], row["ok"], row["world_size"]) for row in rows] == [(10, True, 1), (20, True, 1)]
    found = run_json("show", saved)
    assert found["step"] == 20
    tensors = {one["name"]: one for one in found["tensors"]}
    assert tensors["run.page"] | {"shards": 0} == {
        "name": "run.page", "dtype": "F32", "shape": [1024], "bytes": 4096, "shards": 0,
    }  # fmt: skip
    assert found["aliases"] == {"run.weight": "run.head.weight"}
    assert found["values"]["run.seed"] == 20
    some = run_json("show", f"{saved}@10", "--only", "run.b*")
    assert [one["name"] for one in some["tensors"]] == ["run.bf16"]
    assert "run.page" in run("show", saved / "step-10")[1]


def test_names_are_shown_as_they_are_and_json_is_strict(tmp_path):
    state = {"a[/b]": torch.zeros(2), "c[red]": torch.ones(1), ":smile:": 1, "d[/e]": [math.nan, {"f": -math.inf}]}
    with Checkpointer(tmp_path, group=SINGLE) as ckpt:
        ckpt.save(1, Flat(state)).wait()
        ckpt.save(2, Flat(state | {"a[/b]": torch.tensor([0.0, math.inf]), "d[/e]": 2})).wait()
    shown, told = run("show", f"{tmp_path}@1")[1], run("diff", f"{tmp_path}@1", f"{tmp_path}@2", ok=(1,))[1]
    assert all(name in shown for name in state), shown
    assert "a[/b]" in told
    assert "d[/e]" in told
    assert run_json("show", f"{tmp_path}@1")["values"]["d[/e]"] == ["nan", {"f": "-inf"}]
    assert run_json("diff", f"{tmp_path}@1", f"{tmp_path}@2", ok=(1,))[0]["max_abs"] == "inf"


def test_ls_says_what_is_damaged(saved, tmp_path):
    root = copied(saved, tmp_path)
    (root / "step-20" / DATA).write_bytes(b"")
    rows = run_json("ls", root, ok=(1,))
    assert rows[1]["reason"].startswith(f"step-20/{DATA}: 0 bytes long and saved with")


def test_diff_counts_and_measures(saved, tmp_path):
    assert run("diff", f"{saved}@10", saved / "step-10") == (0, "no differences\n")
    state = assorted(10)
    state["page"][3] += 2.0
    state["flags"] = torch.tensor([True, False])
    state["seed"] = 11
    del state["odd"]
    with Checkpointer(tmp_path / "b", group=SINGLE) as ckpt:
        ckpt.save(1, {"run": Flat(state)}).wait()
    found = {one["name"]: one for one in run_json("diff", f"{saved}@10", tmp_path / "b", ok=(1,))}
    assert found.keys() == {"run.page", "run.flags", "run.seed", "run.odd"}
    assert (found["run.page"]["kind"], found["run.page"]["different"]) == ("numbers", 1)
    assert found["run.page"]["max_abs"] == pytest.approx(2.0)
    assert found["run.flags"]["kind"] == "shape"
    assert found["run.odd"]["kind"] == "only in A"
    assert (found["run.seed"]["a"], found["run.seed"]["b"]) == (10, 11)
    assert len(run_json("diff", f"{saved}@10", tmp_path / "b", "--only", "run.p*", ok=(1,))) == 1


def test_a_pattern_that_matches_nothing_is_said(saved, tmp_path):
    run("restore", saved, tmp_path / "a.pt", "--format", "torch")
    for args in (("show", saved), ("show", tmp_path / "a.pt"), ("diff", saved, tmp_path / "a.pt")):
        assert re.search(r"no name of \S+ matches 'none\*'", run(*args, "--only", "none*", ok=(2,))[1])


def test_diff_sees_what_fp64_cannot_tell_apart(tmp_path):
    for name, number in (("a", 2**53), ("b", 2**53 + 1)):
        torch.save({"n": torch.tensor([number, 3])}, tmp_path / f"{name}.pt")
    (found,) = run_json("diff", tmp_path / "a.pt", tmp_path / "b.pt", ok=(1,))
    assert (found["name"], found["kind"], found["different"]) == ("n", "numbers", 1)


def test_diff_reads_any_two_formats(saved, tmp_path):
    run("restore", saved, tmp_path / "a.pt", "--format", "torch")
    assert run("diff", saved, tmp_path / "a.pt")[0] == 0


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


def test_show_says_whose_size_it_is(saved, tmp_path):
    state = {"a": torch.zeros(1000), "b": torch.zeros(10), "c": torch.zeros(10)}
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        ckpt.save(1, Flat(state)).wait()
    run("restore", tmp_path / "run", tmp_path / "a.pt", "--format", "torch")
    size = (tmp_path / "run" / "step-1" / DATA).stat().st_size / 1000
    for only, said in (("*", f"3 tensors, {size:.1f} kB in 1 file of 1 rank"), ("a", "1 of 3 tensors, 4.0 kB, of"),
                       ("a", f"of {size:.1f} kB in 1 file of 1 rank"), ("[bc]", "2 of 3 tensors, 80 B")):  # fmt: skip
        assert said in run("show", tmp_path / "run", "--only", only)[1]
    assert "a torch checkpoint: 1 of 3 tensors, 40 B\n" in run("show", tmp_path / "a.pt", "--only", "b")[1]
    assert "a torch checkpoint: 3 tensors, 4.1 kB\n" in run("show", tmp_path / "a.pt")[1]


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


def test_prune_keeps_the_newest_that_verifies(saved, tmp_path):
    root = copied(saved, tmp_path)
    data = bytearray((root / "step-20" / DATA).read_bytes())
    data[-1] ^= 1
    (root / "step-20" / DATA).write_bytes(data)
    (root / f"step-30.tmp-{'a' * 8}-{'b' * 8}").mkdir()  # of a run that never saved: only a person clears it
    left = f"step-30.tmp-{'a' * 8}-{'b' * 8}"
    assert run_json("prune", root, "--keep", 1, "--dry-run")["removed"] == [left]
    assert run_json("prune", root, "--keep", 1)["removed"] == [left]
    assert sorted(path.name for path in root.glob("step-*")) == ["step-10", "step-20"]
    assert run_json("prune", copied(saved, tmp_path / "x"), "--keep", 1)["removed"] == ["step-10"]


def test_prune_lets_a_save_under_way_be(saved, tmp_path):
    from checkpointing.storage.local import LocalStorage

    root = copied(saved, tmp_path)
    tmp = root / f"step-30.tmp-{'a' * 8}-{'b' * 8}"
    tmp.mkdir()
    lock = LocalStorage().lock(tmp)
    assert run_json("prune", root, "--keep", 2)["removed"] == []
    os.close(lock)


def test_request_leaves_the_file_a_job_looks_for(saved, tmp_path):
    root = copied(saved, tmp_path)
    assert run_json("request", root) == {"path": str(root / "request"), "already": False}
    assert run_json("request", root)["already"] is True
    assert run("request", root)[1] == "was asked already: is saved at the next step of a job that runs there\n"
    assert "a save is asked for" in run("doctor", root)[1]
    assert "does not exist" in run("request", tmp_path / "none", ok=(2,))[1]
    _, text = run("request", "s3://bucket/run", ok=(2,))
    assert text == "s3://bucket/run is a second tier, which no job looks at; give the local folder of the run"


def test_a_folder_of_other_things_is_no_run_and_an_empty_one_is(saved, tmp_path):
    """A new run's folder is there and empty until the first save, which a `request` may ask for."""
    verbs = {"ls": (), "doctor": (), "prune": ("--keep", 1), "request": (), "verify": ()}
    (tmp_path / "job" / "checkpoints").mkdir(parents=True)
    (tmp_path / "job" / "checkpoints" / "config.json").write_text("{}")
    for verb, more in verbs.items():
        _, text = run(verb, tmp_path / "job", *more, ok=(2,))
        assert "job is no folder of a run: it holds checkpoints and no step-N; give the folder that a job" in text
        _, text = run(verb, tmp_path, *more, ok=(2,))
        assert "it holds job and no step-N; give the folder that a job saves to" in text
    shutil.copytree(saved / "step-10", tmp_path / "renamed")
    assert "it is one checkpoint, under another name" in run("ls", tmp_path / "renamed", ok=(2,))[1]
    assert os.listdir(tmp_path / "job" / "checkpoints") == ["config.json"]
    (new := tmp_path / "new").mkdir()
    assert (run_json("ls", new), run_json("prune", new, "--keep", 1)["removed"]) == ([], [])
    assert run_json("request", new)["already"] is False
    assert {one["level"] for one in run_json("doctor", new)} == {"ok", "note"}
    with Checkpointer(new, group=SINGLE) as ckpt:
        assert ckpt.requested()
        ckpt.save(1, Flat(assorted(1))).wait()
    assert sorted(os.listdir(new)) == ["latest", "step-1"]


def test_the_folder_of_a_job_stands_for_the_checkpoints_in_it(saved, tmp_path):
    """As `run.folder` of launch.finetune does; a folder that is a checkpoint itself is meant as such."""
    job = tmp_path / "job"
    shutil.copytree(saved, job / "checkpoints")
    (job / "config.json").write_text("{}")
    assert [row["step"] for row in run_json("ls", job)] == [10, 20]
    assert run_json("show", f"{job}@10")["step"] == 10
    assert run("diff", job, job / "checkpoints" / "step-20")[0] == run("doctor", job)[0] == run("verify", job)[0] == 0
    assert run_json("prune", job, "--keep", 2)["removed"] == []
    assert run_json("request", job)["path"] == str(job / "checkpoints" / "request")
    run("restore", job, tmp_path / "a.pt", "--format", "torch", "--only", "run.page")
    assert run_json("save", tmp_path / "a.pt", job, "--step", 30)["path"] == str(job / "checkpoints" / "step-30")
    run("restore", f"{job}@10", tmp_path / "hf", "--format", "hf", "--only", "run.page")
    shutil.copytree(saved, tmp_path / "hf" / "checkpoints")
    assert run_json("show", tmp_path / "hf")["format"] == "hf"


def test_a_step_without_its_manifest_is_a_failed_check_for_every_verb(saved, tmp_path):
    root = copied(saved, tmp_path)
    (root / "step-20" / "manifest.json").unlink()
    for verb in ("ls", "verify", "doctor"):
        assert "step-20/manifest.json: No such file" in run(verb, root, ok=(1,))[1].replace("\n", "")


def test_doctor(saved, tmp_path):
    root = copied(saved, tmp_path)
    assert {one["level"] for one in run_json("doctor", root)} == {"ok"}
    names = sorted(os.listdir(root))
    with Checkpointer(tmp_path / "other", group=SINGLE) as ckpt:
        place = ckpt.save(30, {"run": Flat(assorted(1))}).wait()
    place.rename(root / "step-30")
    found = run_json("doctor", root, ok=(1,))
    assert [one["what"] for one in found if one["level"] == "problem"] == [
        "checkpoints of 2 runs share the folder; a restore takes the newest"
    ]
    assert sorted(os.listdir(root)) == sorted([*names, "step-30"])


def copied(source, where):
    where.mkdir(exist_ok=True)
    return shutil.copytree(source, where / "run")


def test_show_reads_other_tools_checkpoints_too(saved, tmp_path):
    run("restore", f"{saved}@10", tmp_path / "a.pt", "--format", "torch", "--only", "run.*")
    found = run_json("show", tmp_path / "a.pt", "--only", "run.b*")
    assert found["format"] == "torch"
    assert found["tensors"] == [{"name": "run.bf16", "dtype": "bfloat16", "shape": [33], "bytes": 66, "shards": []}]
    assert "a torch checkpoint: " in run("show", tmp_path / "a.pt")[1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("")
    assert "is no checkpoint we know: it holds x.txt" in run("show", tmp_path / "other", ok=(2,))[1]


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
def test_every_format_is_written_in_part_in_another_dtype_and_for_other_ranks(tmp_path, format_, ranks):
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
    run("save", part, tmp_path / "back")
    back = Flat({})
    with Checkpointer(tmp_path / "back", group=SINGLE) as ckpt:
        ckpt.restore(back)
    found = {name.rpartition("a.")[2]: one for name, one in back.loaded.items() if torch.is_tensor(one)}
    assert same(found["weight"], STATE["model.a.weight"].bfloat16())
    assert same(found["bias"], STATE["model.a.bias"].bfloat16())
    assert not any("exp_avg" in name for name in back.loaded)


def test_every_verb_has_json_and_its_exit_codes(saved, tmp_path):
    """0 when all is well, 1 when a check failed, 2 on bad input; and nothing but one document on stdout."""
    root, none = copied(saved, tmp_path), tmp_path / "none"
    right = {
        "ls": (root,), "show": (root,), "verify": (root,), "diff": (f"{root}@10", f"{root}@10"),
        "save": (f"{root}@10", tmp_path / "new"), "restore": (root, tmp_path / "a.pt", "--format", "torch"),
        "request": (root,), "prune": (root, "--keep", 2), "doctor": (root,),
    }  # fmt: skip
    for verb, args in right.items():
        run_json(verb, *args)
    wrong = {verb: (none, *args[1:]) for verb, args in right.items()} | {"restore": (none, tmp_path / "b")}
    wrong["restore"] += ("--format", "torch")
    for verb, args in wrong.items():
        code, text = run(verb, *args, "--json", ok=(2,))
        assert code == 2
        assert str(none) in text, verb
    data = root / "step-20" / DATA
    data.write_bytes(data.read_bytes()[:-1])
    checks = {"ls": (root,), "show": (f"{root}@20",), "verify": (root,), "doctor": (root,)}
    checks |= {"diff": (f"{root}@10", f"{root}@20"), "save": (f"{root}@20", tmp_path / "x")}
    checks |= {"restore": (f"{root}@20", tmp_path / "c", "--format", "torch")}
    for verb, args in checks.items():
        assert run(verb, *args, "--json", ok=(1,))[0] == 1, verb
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "c").exists()


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


def test_what_is_no_step_and_no_run_is_said(saved, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    assert "'x' is no step" in run("show", f"{saved}@x", ok=(2,))[1]
    assert "there are: [10, 20]" in run("verify", f"{saved}@99", ok=(2,))[1]
    assert "is a file" in run("ls", tmp_path / "m.pt", ok=(2,))[1]
    assert "longrail" not in run("restore", f"{saved}@20", tmp_path / "o", "--format", "xx", ok=(2,))[1]


def test_a_newest_step_that_is_cut_is_passed_over_aloud(saved, tmp_path):
    runs = copied(saved, tmp_path)
    data = (runs / "step-20" / DATA).read_bytes()
    (runs / "step-20" / DATA).write_bytes(data[:-3])
    cases = (("restore", runs, tmp_path / "o.pt", "--format", "torch"), ("show", runs), ("save", runs, tmp_path / "c"))
    for args in cases:
        assert f"passed over, for step 10: step-20/{DATA}: " in run(*args)[1]
    assert run_json("show", runs)["step"] == 10
    assert "passed over" not in run("show", f"{runs}@10")[1]


def test_a_step_that_is_not_there_is_said_by_every_verb(saved, tmp_path):
    for args in (("restore", f"{saved}@3", tmp_path / "o", "--format", "torch"), ("diff", f"{saved}@3", saved)):
        assert "there is no step 3 in" in run(*args, ok=(2,))[1]


def test_restore_of_a_damaged_run_names_another_step(saved, tmp_path):
    runs = copied(saved, tmp_path)
    data = bytearray((runs / "step-20" / DATA).read_bytes())
    data[-3] ^= 1
    (runs / "step-20" / DATA).write_bytes(data)
    assert f"another step: {runs}@10" in run("restore", runs, tmp_path / "o.pt", "--format", "torch", ok=(1,))[1]
