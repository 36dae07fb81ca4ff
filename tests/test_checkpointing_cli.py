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

from checkpointing import SINGLE, Checkpointer
from tests.checkpoint_commands import DATA, copied, run, run_json, two_steps
from tests.flat_states import Flat, assorted
from tests.spawn import ROOT


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 10 and 20; tests that change it copy it."""
    return two_steps(tmp_path_factory.mktemp("runs") / "a")


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
    state["none"] = None
    del state["odd"]
    with Checkpointer(tmp_path / "b", group=SINGLE) as ckpt:
        ckpt.save(1, {"run": Flat(state)}).wait()
    found = {one["name"]: one for one in run_json("diff", f"{saved}@10", tmp_path / "b", ok=(1,))}
    assert found.keys() == {"run.page", "run.flags", "run.seed", "run.odd", "run.none"}
    assert (found["run.page"]["kind"], found["run.page"]["different"]) == ("numbers", 1)
    assert found["run.page"]["max_abs"] == pytest.approx(2.0)
    assert found["run.flags"]["kind"] == "shape"
    assert (found["run.odd"]["kind"], found["run.none"]["kind"]) == ("only in A", "only in B")
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


def test_show_reads_other_tools_checkpoints_too(saved, tmp_path):
    run("restore", f"{saved}@10", tmp_path / "a.pt", "--format", "torch", "--only", "run.*")
    found = run_json("show", tmp_path / "a.pt", "--only", "run.b*")
    assert found["format"] == "torch"
    assert found["tensors"] == [{"name": "run.bf16", "dtype": "bfloat16", "shape": [33], "bytes": 66, "shards": []}]
    assert "a torch checkpoint: " in run("show", tmp_path / "a.pt")[1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("")
    assert "is no checkpoint we know: it holds x.txt" in run("show", tmp_path / "other", ok=(2,))[1]


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


def test_what_is_no_step_and_no_run_is_said(saved, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    assert "'x' is no step" in run("show", f"{saved}@x", ok=(2,))[1]
    assert "there are: [10, 20]" in run("verify", f"{saved}@99", ok=(2,))[1]
    assert "is a file" in run("ls", tmp_path / "m.pt", ok=(2,))[1]
    assert "longrail" not in run("restore", f"{saved}@20", tmp_path / "o", "--format", "xx", ok=(2,))[1]


def test_a_step_that_is_not_there_is_said_by_every_verb(saved, tmp_path):
    for args in (("restore", f"{saved}@3", tmp_path / "o", "--format", "torch"), ("diff", f"{saved}@3", saved)):
        assert "there is no step 3 in" in run(*args, ok=(2,))[1]
