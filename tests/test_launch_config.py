from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from launch import doctor, report
from launch.config import FinetuneConfig
from launch.errors import ConfigError
from launch.recipe import flatten_config, read_config, record_config, require_agreement
from tests.spawn import ROOT


def read(*argv):
    return read_config(list(argv), prog="finetune", description="")


def test_the_defaults_are_the_quickstart():
    recipe = ROOT / "recipes" / "quickstart.yaml"
    assert read("--config", str(recipe)) == FinetuneConfig() == read()
    for key in flatten_config(FinetuneConfig()):
        if key != "fresh":
            assert f"{key.rpartition('.')[2]}:" in recipe.read_text()


def test_flags_override_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run:\n  seed: 3\n  steps: 7\ndata:\n  long_files: [a.py, b.py]\n")
    config = read("--config", str(recipe), "--run.steps", "9", "--fresh", "true", "--optimizer.clip_norm", "null")
    assert read("--checkpoint.mirror", "second", "--checkpoint.mirror", "null").checkpoint.mirror is None
    assert read("--run.folder", str(Path.cwd()), "--checkpoint.mirror", "s3://a/b").checkpoint.mirror == "s3://a/b"
    assert (config.run.seed, config.run.steps, config.fresh) == (3, 9, True)
    assert config.data.long_files == ("a.py", "b.py")
    assert config.optimizer.clip_norm is None


def test_print_config_reads_back(tmp_path, capsys):
    flags = ("--chunks.chunk_tokens", "96", "--data.exclude", '["x/*"]', "--model.path", "a folder")
    with pytest.raises(SystemExit) as leaving:
        read(*flags, "--print_config")
    assert leaving.value.code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert read("--config", str(recipe)) == read(*flags) != FinetuneConfig()


def test_help_says_what_every_setting_means(capsys):
    with pytest.raises(SystemExit) as leaving:
        read("--help")
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Start over: the run's folder is moved aside" in text
    blocks = text.split(" --")[1:]
    for part in fields(FinetuneConfig):
        value = getattr(FinetuneConfig(), part.name)
        for entry in fields(value) if is_dataclass(value) else []:
            block = next(b for b in blocks if b.startswith(f"{part.name}.{entry.name} "))
            words = block.split("(type:")[0].split()[2:]
            assert len(words) > 1, f"{part.name}.{entry.name} has no help"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--chunks.chunk_tokens", "0"], "chunk_tokens is 0; it must be at least 1"),
        (["--chunks.retain", "0"], "retain is 0"),
        (["--chunks.global_batch", "0"], "chunks.global_batch is 0; it must be at least 1"),
        (["--run.steps", "0"], "run.steps is 0; it must be at least 1"),
        (["--run.folder", ""], "run.folder is ''; give a folder with a name"),
        (["--run.folder", "."], "run.folder is '.'; give a folder with a name"),
        (["--run.folder", "runs/.."], "run.folder is 'runs/..'; give a folder with a name"),
        (["--run.seed", str(2**63)], "run.seed is 9223372036854775808; it must be at least 0 and below 2**63"),
        (["--model.vocab_size", "100"], "model.vocab_size is 100; it must be at least 257"),
        (["--model.vocab_size", "1" + "0" * 12], "model.vocab_size is 1000000000000; it must be at most 16777216"),
        (["--model.hidden_size", "4" + "0" * 25], "model.hidden_size is 4" + "0" * 25 + "; it must be below 2**63"),
        (["--model.num_heads", "3"], "multiple of twice model.num_heads"),
        (["--model.num_kv_heads", "7"], "model.num_heads is 2; it must be a multiple of 7"),
        (["--optimizer.beta2", "1.0"], "beta2 are 0.9 and 1.0"),
        (["--optimizer.clip_norm", "0"], "optimizer.clip_norm is 0.0; it must be more than 0, or null"),
        (["--optimizer.eps", "0"], "optimizer.eps is 0.0; it must be at least 1e-30"),
        (["--optimizer.lr", ".nan"], "optimizer.lr is nan"),
        (["--optimizer.lr", ".inf"], "optimizer.lr is inf; it must be finite"),
        (["--chunks.pair_cost", ".inf"], "chunks.pair_cost is inf; it must be finite"),
        (["--moe.timeout_s", ".inf"], "moe.timeout_s is inf; it must be finite"),
        (["--run.timeout_s", "1e300"], "run.timeout_s is 1e+300; it must be at most 1e+08"),
        (["--schedule.final_ratio", "2"], "schedule.final_ratio is 2.0"),
        (["--checkpoint.every", "0"], "checkpoint.every is 0"),
        (["--checkpoint.mirror", ""], "checkpoint.mirror is ''; give a folder, s3://bucket/prefix, or null"),
        (["--checkpoint.mirror", "s3://"], "checkpoint.mirror is 's3://'; give a folder"),
        (["--checkpoint.mirror", "ftp://a/b"], "checkpoint.mirror is 'ftp://a/b'; give a folder"),
        (["--run.folder", "a/b", "--checkpoint.mirror", "a/b/checkpoints"], "in which the run itself is"),
        (["--run.folder", "a/b", "--checkpoint.mirror", "a/b/c/d"], "in which the run itself is"),
        (["--checkpoint.incremental", "sometimes"], "checkpoint.incremental"),
        (["--data.kind", "csv"], "data.kind"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--optimizer.learning_rate", "1"], "--optimizer.learning_rate"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--pipeline.rank", "2"], "--pipeline.rank 2; did you mean pipeline.ranks?"),
        (["--fres", "true"], "--fres true; did you mean fresh?"),
        (
            ["--pipeline.rounds", "2"],
            "rounds is 2, and state_aware_1f1b passes the micro-batches of a step once",
        ),
        (
            ["--pipeline.open_slots", "null"],
            "open_slots is null, and state_aware_1f1b has stages, not slots; leave",
        ),
        (
            ["--pipeline.microbatches", "3"],
            "microbatches is 3, and state_aware_1f1b takes no host memory for them",
        ),
        (
            ["--pipeline.schedule", "roundpipe", "--pipeline.recompute", "true"],
            "pipeline.recompute is true, and roundpipe always recomputes; leave it out, or use another schedule",
        ),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(argv, text):
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_of_a_recipe_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("chunks:\n  chunk_token: 3\n")
    with pytest.raises(ConfigError, match=r"chunk_token'; did you mean chunks\.chunk_tokens\?"):
        read("--config", str(recipe))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run:\n  seed: 3\nmodel:\n  path: x\nrun:\n  steps: 7\n", r"run is given twice, in lines 1 and 5 of a recipe"),
        ("run:\n  seed: 3\n  steps: 7\n  seed: 4\n", r"run\.seed is given twice, in lines 2 and 4 of a recipe"),
        ('{"run": {"seed": 3,\n "seed": 4}}', r"run\.seed is given twice, in lines 1 and 2 of a recipe"),
    ],
)
def test_a_recipe_that_says_something_twice_is_refused(tmp_path, text, words):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read("--config", str(recipe))


@pytest.mark.parametrize("command", [report.main, doctor.main])
def test_the_other_commands_complete_no_option_either(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        command(["--jso", "--outp", "x", "folder"])
    assert leaving.value.code == 2
    assert "unrecognized arguments: --jso --outp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"run:\n  epochs: null\n", "run.epochs is null; give it a value"),
        (b"optimizer:\n  beta1: null\n", "optimizer.beta1 is null"),
        (b"data:\n  exclude: null\n", "data.exclude is null"),
        (b"optimizer: 5\n", "optimizer is 5; it must be a section"),
        (b"run: null\n", "run is None; it must be a section"),
        (b"\xff\xfe\x00", "utf-8"),
        (b'run:\n  folder: "a\\0b"\n', "give a folder with a name"),
    ],
)
def test_a_recipe_without_values_is_refused(tmp_path, text, words):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        read("--config", str(recipe))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_ranks_must_agree():
    ours = flatten_config(FinetuneConfig())
    theirs = {**ours, "run.seed": ours["run.seed"] + 1, "optimizer.lr": 0.5}
    require_agreement([(None, ours), (None, dict(ours))])
    with pytest.raises(ConfigError) as error:
        require_agreement([(None, ours), (None, ours), (None, theirs)])
    for word in (
        "ranks 0 and 2",
        f"optimizer.lr is {ours['optimizer.lr']} and 0.5",
        "run.seed is 0 and 1",
        "same recipe",
    ):
        assert word in str(error.value)
    with pytest.raises(ConfigError, match=r"^on rank 1: no such key"):
        require_agreement([(None, ours), ("no such key", {})])
    with pytest.raises(ConfigError, match=r"^no such key"):
        require_agreement([("no such key", {}), ("no such key", {})])


def test_a_run_remembers_its_settings(tmp_path):
    path = tmp_path / "run" / "config.json"
    assert record_config(path, FinetuneConfig(fresh=True)) == []
    assert read("--config", str(path)) == FinetuneConfig()
    assert record_config(path, read("--run.steps", "5", "--fresh", "true")) == ["run.steps was None and is 5"]
    path.write_text("{cut off")
    assert record_config(path, FinetuneConfig()) == []
