"""What runs the pages for those who come from elsewhere: each diff is applied, and what it leaves behind is run."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from checkpointing import SINGLE, Checkpointer
from checkpointing.adapters.dcp import DcpWriter
from chunkflow import ChunkRunner
from tests import docs_chunkflow
from tests.docs_blocks import Run, after
from tests.spawn import run_ranks
from tests.tiny import tiny_model


def trl(folder, texts):
    names = docs_chunkflow.sft_names(folder)
    names["sft_args"].save_strategy, names["sft_args"].save_steps = "steps", 1
    with contextlib.chdir(folder):
        names = docs_chunkflow.run_code(after(texts[0]), **names)
    assert names["trainer"].state.global_step == 2
    with Checkpointer(folder / "runs/a/checkpoints", group=SINGLE) as saved:
        assert saved.steps()[-1] == 2


def deepspeed_rank(info, code, folder):
    from checkpointing.adapters.deepspeed import LongrailCheckpointEngine

    names = docs_chunkflow.deepspeed_names(info)
    names["config"]["zero_optimization"]["stage"] = 1
    names |= {"ChunkRunner": ChunkRunner, "LongrailCheckpointEngine": LongrailCheckpointEngine}
    with contextlib.chdir(folder):
        return docs_chunkflow.trained(code, rank=info.rank, world_size=info.world_size, **names)


def deepspeed(folder, texts):
    pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    env = {"DS_ACCELERATOR": "cpu"}
    losses = run_ranks(deepspeed_rank, 2, after(texts[0]), str(folder), fresh=True, timeout_s=150, env=env)
    assert losses == pytest.approx([docs_chunkflow.expected_loss()] * 2, rel=1e-5)
    assert (folder / "runs" / "a" / "latest").read_text().strip() == "last"


def megatron(folder, texts):
    docs_chunkflow.megatron(folder, [after(texts[0])])


def torchtitan_rank(info, code, folder):
    def state_dict(model, optimizer):
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optim": moments}

    names = {
        "fully_shard": fully_shard, "torch": torch, "ChunkRunner": ChunkRunner, "DcpWriter": DcpWriter, "dcp": dcp,
        "state_dict": state_dict, "step": 0, "model": tiny_model(dtype=torch.float32),
    }  # fmt: skip
    with contextlib.chdir(folder):
        names = docs_chunkflow.run_code(code, rank=info.rank, world_size=info.world_size, **names)
    dist.barrier()
    return float(names["loss"])


def torchtitan(folder, texts):
    losses = run_ranks(torchtitan_rank, 2, after(texts[0]), str(folder))
    assert losses == pytest.approx([docs_chunkflow.expected_loss()] * 2, rel=1e-5)
    with Checkpointer(folder / "outputs" / "checkpoint", group=SINGLE) as saved:
        assert saved.steps() == [1]


RUNS = [
    Run("docs/from_trl.md", ("class Chunked(ChunkedSFTTrainer)",), trl),
    Run("docs/from_deepspeed.md", ("deepspeed.initialize",), deepspeed, slow=True),
    Run("docs/from_megatron.md", ("MegatronRunner(model",), megatron, slow=True),
    Run("docs/from_torchtitan.md", ("DcpWriter(",), torchtitan),
]
