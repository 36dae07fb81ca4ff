"""Rules of the house that no single file can keep by itself."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("chunkflow", "checkpointing", "launch", "moe", "pipeline")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


def test_every_package_is_listed_and_typed():
    found = sorted({relative(p.parent).replace("/", ".") for p in SOURCES})
    assert found == sorted(CONFIG["tool"]["setuptools"]["packages"])
    assert all((ROOT / name / "py.typed").exists() for name in PACKAGES)


def test_no_module_is_named_like_one_of_the_standard_library():
    """With `torchrun file.py` the script's folder comes first on the path."""
    assert not [relative(p) for p in SOURCES if p.stem in sys.stdlib_module_names and p.stem != "__init__"]


def test_files_are_short():
    assert not {relative(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}


@pytest.mark.parametrize("pattern", [r"os\.environ", r"os\.getenv", r"\bRANK\b", r"LOCAL_RANK"])
def test_only_launch_reads_the_environment(pattern):
    leaves = [p for p in SOURCES if not relative(p).startswith("launch/")]
    assert not [relative(p) for p in leaves if re.search(pattern, p.read_text())]


def test_only_storage_touches_the_disk_in_checkpointing():
    calls = r"rename|replace|unlink|remove|fsync|mkdir|makedirs|pwrite"
    forbidden = re.compile(rf"(?<![.\w])(?<!def )open\(|os\.({calls})|write_(text|bytes)\(|shutil\.")
    others = [p for p in SOURCES if relative(p).startswith("checkpointing/") and "/storage/" not in relative(p)]
    assert not [relative(p) for p in others if forbidden.search(p.read_text())]


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"import pickle|from pickle|pickle\.load", ("checkpointing/formats/plain_pickle.py",)),
        (r"torch\.save\(", ("checkpointing/formats/", "checkpointing/adapters/")),
    ],
)
def test_pickle_stays_where_other_tools_formats_are(pattern, allowed):
    """DCP's metadata is read by an unpickler that makes the classes of a list and nothing else."""
    code = re.compile(r'""".*?"""|#[^\n]*', re.DOTALL)
    found = [relative(p) for p in SOURCES if re.search(pattern, code.sub("", p.read_text()))]
    assert not [path for path in found if not path.startswith(allowed)]


def test_torch_files_are_read_as_weights_only():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [word.value for word in node.keywords if word.arg == "weights_only"]
                assert [ast.unparse(value) for value in safe] == ["True"], relative(path)


def test_pins_satisfy_the_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    groups = [CONFIG["project"]["dependencies"], *CONFIG["project"]["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group if not r.startswith("longrail")):
        name, at_least = re.sub(r"\[.*?\]|_", lambda m: "-" if m[0] == "_" else "", requirement).split(">=")
        number = [tuple(int(x) for x in v.split(".")[:2]) for v in (pins[name.lower()], at_least)]
        assert number[0] >= number[1], requirement
