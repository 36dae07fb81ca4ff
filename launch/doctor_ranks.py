"""The doctor's self test: real ranks, an all-reduce, and a step in chunks against the same step whole.

python -m launch.doctor_ranks RANK WORLD_SIZE STORE_FILE      one rank; `self_test` starts them
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from chunkflow import ChunkLoader, ChunkRunner
from chunkflow.sources import shifted
from chunkflow.sources_memory import MemorySource
from launch.doctor_checks import Check, passed
from launch.env import end_with_parent

RANKS, TIMEOUT_S, TOLERANCE = 2, 120.0, 1e-10
_NAME = "self test"
"""Loss and gradients are in fp64, where chunks and whole sequences agree to this part of the largest gradient."""


def self_test(*, ranks: int = RANKS, timeout_s: float = TIMEOUT_S) -> Check:
    """Run the test on ranks of their own; a rank that fails, dies or hangs is named in the check."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        place = Path(folder)
        jobs = [_start(rank, ranks, place) for rank in range(ranks)]
        try:
            codes = _wait(jobs, begun + timeout_s)
        finally:
            for job in jobs:
                job.kill()
                job.wait()
        outputs = [(place / f"{rank}.log").read_text(errors="replace").strip() for rank in range(ranks)]
    for rank, code in enumerate(codes):
        if code:
            last = outputs[rank].splitlines()[-1] if outputs[rank] else "no output"
            return _failed(f"rank {rank} ended with {code}: {last}")
    if None in codes:
        stuck = [rank for rank, code in enumerate(codes) if code is None]
        return _failed(f"ranks {stuck} did not end within {timeout_s:g} s")
    return passed(_NAME, f"{ranks} ranks, {outputs[0].splitlines()[-1]}, {time.monotonic() - begun:.0f} s")


def _start(rank: int, ranks: int, place: Path) -> subprocess.Popen[bytes]:
    with (place / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(_command(rank, ranks, place), stdout=log, stderr=subprocess.STDOUT)


def _command(rank: int, ranks: int, place: Path) -> list[str]:
    return [sys.executable, "-m", "launch.doctor_ranks", str(rank), str(ranks), str(place / "store"), str(os.getpid())]


def _wait(jobs: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Wait for all to end, or one to fail, until the deadline; return how each had ended by itself, None: not yet."""
    while True:
        codes = [job.poll() for job in jobs]
        if None not in codes or any(codes) or time.monotonic() >= deadline:
            return codes
        time.sleep(0.05)


def _failed(found: str) -> Check:
    advice = (
        "one rank alone, with its whole output: python -m launch.doctor_ranks 0 1 $(mktemp -u). When that is well, "
        "ranks do not reach each other over the loopback interface: look at firewalls, and at GLOO_SOCKET_IFNAME"
    )
    return Check(name=_NAME, status="failed", found=found, advice=advice)


def run_rank(rank: int, ranks: int, store: Path, *, timeout_s: float = TIMEOUT_S) -> str:
    """Be one rank of the test; return what was seen. Raises on anything wrong."""
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=FileStore(str(store), ranks), rank=rank, world_size=ranks, timeout=limit)
    try:
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        if total.item() != ranks * (ranks + 1) / 2:
            raise RuntimeError(f"an all-reduce of 1 to {ranks} gave {total.item()}")
        error = chunk_error(rank, ranks)
        if not error <= TOLERANCE:
            raise RuntimeError(f"chunks and whole sequences differ by {error:.1e}, more than {TOLERANCE:g}")
        return f"all-reduce, and gradients of chunks equal to the whole within {error:.0e}"
    finally:
        dist.destroy_process_group()


def chunk_error(rank: int, ranks: int) -> float:
    """Return by how much a step in chunks over the ranks differs from it whole: a part of the largest gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = nn.Module.double(LlamaForCausalLM(config))
    samples = [torch.randint(64, (length,)) for length in (5, 40, 11, 3)]
    source = MemorySource([shifted(ids.numpy(), None) for ids in samples])
    loader = ChunkLoader(source, chunk_tokens=16, global_batch=len(samples), rank=rank, world_size=ranks)
    runner = ChunkRunner(model)
    with loader:
        loss = runner.forward_backward(next(iter(loader)))
    chunked = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    targets = sum(len(ids) - 1 for ids in samples)
    whole = torch.zeros((), dtype=torch.float64)
    for ids in samples:
        logits = model(ids.unsqueeze(0)).logits[0, :-1]  # transformers' own loss rounds them to fp32
        part = cross_entropy(logits, ids[1:], reduction="sum") / targets
        part.backward()
        whole += part.detach()
    worst, largest = abs(float(loss - whole)), 0.0
    for parameter, ours in zip(model.parameters(), chunked, strict=True):
        assert parameter.grad is not None
        assert ours is not None
        worst = max(worst, float((parameter.grad - ours).abs().max()))
        largest = max(largest, float(parameter.grad.abs().max()))
    return worst / largest


if __name__ == "__main__":
    end_with_parent()
    if len(sys.argv) > 4 and os.getppid() != int(sys.argv[4]):  # it ended while torch was imported
        sys.exit(1)
    print(run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
