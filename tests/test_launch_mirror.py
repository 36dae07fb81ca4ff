"""`checkpoint.mirror` of a job: a run that has lost its folder goes on from the second tier, to the bit."""

import json
import os
import shutil
from uuid import uuid4

import pytest

from checkpointing.folder import Folder
from checkpointing.storage import open_storage
from tests.launch_jobs import settings, snapshot, write_corpus
from tests.spawn import run_ranks
from tests.test_checkpointing_s3 import bucket
from tests.test_launch_bad_input import attempt

__all__ = ["bucket"]


def job(tmp_path, run, env=None, **changes):
    """Run a job of 3 steps on one rank that saves every step; return its error, None when it went well."""
    flags = settings(
        tmp_path / "corpus", tmp_path / run, checkpoint__every=1, chunks__global_batch=2, run__eval_every=9, **changes
    )
    store = tmp_path / f"store-{uuid4().hex}"
    return run_ranks(attempt, 1, str(store), [flags], timeout_s=100, env=env)[0]


def lost_and_resumed(tmp_path, mirror, env=None):
    write_corpus(tmp_path / "corpus", files=9)
    assert job(tmp_path, "whole") is None
    changes = {"checkpoint__mirror": mirror, "checkpoint__incremental": True}
    assert job(tmp_path, "run", env, **changes) is None
    second = Folder(*open_storage(mirror))
    assert second.candidates() == [1, 2, 3]
    shutil.rmtree(tmp_path / "run")
    second.storage.remove_tree(second.at(3))
    fresh = job(tmp_path, "run", env, fresh=True, **changes)
    assert f"checkpoint.mirror {mirror} holds step 2, from which a fresh run would go on" in fresh
    assert not (tmp_path / "run").exists()
    assert job(tmp_path, "run", env, **changes) is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_from"] == 2
    assert snapshot(tmp_path / "run" / "model") == snapshot(tmp_path / "whole" / "model")
    assert second.candidates() == [1, 2, 3]


def test_a_job_resumes_from_a_second_folder_alone(tmp_path):
    lost_and_resumed(tmp_path, str(tmp_path / "second"))


def test_a_job_resumes_from_a_bucket_alone(tmp_path, bucket):
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    lost_and_resumed(tmp_path, f"{bucket}/job", env)


@pytest.mark.parametrize("incremental", [False, True])
def test_an_incremental_job_links_what_did_not_change(tmp_path, incremental):
    """The frozen model beside adapters is written once."""
    pytest.importorskip("peft", reason="the extra [peft] is not installed")
    write_corpus(tmp_path / "corpus", files=9)
    changes = {"lora__rank": 2, "model__vocab_size": 600, "model__hidden_size": 256, "data__max_file_bytes": 4000}
    assert job(tmp_path, "run", checkpoint__incremental=incremental, **changes) is None
    files = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-3").glob("*.safetensors")}
    assert (len(files) > 1) == incremental, files
