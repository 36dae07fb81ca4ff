"""What a start of a job does not wait for."""

import subprocess
import sys

from tests.launch_jobs import write_corpus
from tests.spawn import ROOT

LATE = ("datasets", "deepspeed", "matplotlib", "pandas", "peft", "tensorboard")
"""Each takes from a tenth of a second to several to import, on every rank; what needs one imports it then."""
CODE = """
import sys
import launch.finetune
from launch.data import load_data
from launch.recipe import read_config
flags = ["--data.path", "corpus", "--data.cache", "cache", "--data.long_files", "[]", "--model.vocab_size", "300"]
assert len(load_data(read_config(flags, prog="x", description="")).train)
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_a_job_on_texts_imports_nothing_that_it_does_not_use(tmp_path):
    write_corpus(tmp_path / "corpus", files=20)
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not [name for name in LATE if f"'{name}'" in done.stdout]
