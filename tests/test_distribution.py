"""What is published: built from the sources, installed where no checkout is, and used there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.launch_jobs import settings, write_corpus
from tests.spawn import ROOT

PACKAGES = ("checkpointing", "chunkflow", "launch", "moe", "pipeline")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = CONFIG["project"]["version"]
NOT_SOURCES = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
pytestmark = [pytest.mark.skipif(os.name != "posix", reason="POSIX paths"), pytest.mark.timeout(300)]


def run(command, **given):
    done = subprocess.run(
        [str(one) for one in command], capture_output=True, text=True, timeout=120, check=False, **given
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that pip builds from it; nothing is asked of the network."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", hook], cwd=folder / "source")
    sdist = folder / f"longrail-{VERSION}.tar.gz"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, sdist], cwd=folder)
    return sdist, folder / f"longrail-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment of its own with the wheel in it; what it depends on is found where this process has it."""
    place = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", place / "env"])
    python = place / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", built[1]], cwd=place)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # the folder; its own .pth files are not read
    return place


def outside(installed, *command):
    """Run a command of the environment in a folder without sources."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return run([installed / "env" / "bin" / command[0], *command[1:]], cwd=installed, env=env)


def test_the_wheel_is_the_five_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name for name in wheel.namelist() if not name.startswith(f"longrail-{VERSION}.dist-info/")}
    wanted = {str(p.relative_to(ROOT)) for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file()}
    assert found == {name for name in wanted if "__pycache__" not in name}
    assert {f"{name}/py.typed" for name in PACKAGES} <= found


def test_the_sdist_has_sources_and_documentation_and_no_tests(built):
    with tarfile.open(built[0]) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    top = {name.partition("/")[0] for name in names if name}
    assert top == {
        *PACKAGES, "docs", "recipes", "longrail.egg-info", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO",
        "README.md", "pyproject.toml", "setup.cfg",
    }  # fmt: skip


def test_what_is_installed_says_what_it_is(built):
    with zipfile.ZipFile(built[1]) as wheel:
        info = f"longrail-{VERSION}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert f"\nVersion: {VERSION}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    for name, target in CONFIG["project"]["scripts"].items():
        assert f"{name} = {target}" in scripts


def test_everything_is_imported_from_what_was_installed(installed):
    code = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})), sep='\\n')"
    found = outside(installed, "python", "-c", code).split()
    assert len(found) == 5
    assert all(path.startswith(f"{installed}/env/lib/") for path in found)


def test_commands_run(installed):
    assert "verify" in outside(installed, "checkpoint", "--help")
    assert "audit" in outside(installed, "chunkflow", "--help")
    assert "simulate" in outside(installed, "python", "-m", "pipeline", "--help")
    assert "netns" in outside(installed, "python", "-m", "moe", "--help")


def test_a_job_trains_and_its_checkpoint_verifies(installed):
    corpus = write_corpus(installed / "corpus", files=12)
    flags = settings(corpus, Path("run"), run__steps=2, checkpoint__every=1)
    assert "step 2/2" in outside(installed, "python", "-m", "launch.finetune", *flags)
    said = outside(installed, "checkpoint", "verify", "run/checkpoints")
    assert said.splitlines() == [f"step {step}: every byte is what was saved" for step in (1, 2)]


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == VERSION


def test_the_page_of_versions_says_what_is_written():
    from checkpointing import manifest
    from chunkflow import index, plan
    from pipeline import schedule

    page = (ROOT / "docs" / "versions.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \|[^|]+\| (\d+) \|", page, re.MULTILINE))
    assert rows == {
        "checkpoint": str(manifest.FORMAT_VERSION), "chunk plan": str(plan.FORMAT_VERSION),
        "token store in `data.cache`": str(index.FORMAT_VERSION), "pipeline schedule": str(schedule.FORMAT_VERSION),
    }  # fmt: skip
