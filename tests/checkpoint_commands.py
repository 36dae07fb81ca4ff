"""The `checkpoint` command in this process, and a run to give it."""

import json
import shutil

from typer.testing import CliRunner

from checkpointing import SINGLE, Checkpointer, cli
from checkpointing.errors import CheckpointError, IntegrityError
from tests.flat_states import Flat, assorted

DATA = "rank-00000.safetensors"


def two_steps(root):
    """Save steps 10 and 20 to a folder; return it."""
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


def copied(source, where):
    where.mkdir(exist_ok=True)
    return shutil.copytree(source, where / "run")
