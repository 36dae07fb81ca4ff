"""A cap on device memory: what was planned under it runs under it, and what is refused says what would do."""

import re

import pytest
import torch
import torch.distributed as dist

from chunkflow import ChunkLoader, MemorySource
from launch.lora import LoraConfig, with_adapters
from launch.roundpipe_runner import RoundPipeRunner
from pipeline.config import PipelineConfig
from pipeline.errors import PlanError
from tests.spawn import run_ranks
from tests.tiny import sequence, tiny_model

pytestmark = pytest.mark.timeout(240)
TOKENS, BATCH = 128, 4
# One fills a chunk; the others are shorter, several of them in a chunk.
SOURCE = MemorySource(
    [sequence(n, length) for n, length in enumerate((TOKENS, 9, 70, TOKENS - 1, TOKENS, 100, 28, 64))]
)


def runner_of(info, cap_bytes, *, layers, lora=None, frozen=(), **options):
    model = tiny_model("llama", num_hidden_layers=layers, dtype=torch.float32, tie_word_embeddings=layers == 5)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    if lora is not None:
        with_adapters(model, lora)
    config = PipelineConfig(
        schedule="roundpipe", ranks=info.world_size, timeout_s=30, device_memory_bytes=cap_bytes, **options
    )
    return RoundPipeRunner(
        model, config, microbatches=BATCH, tokens=TOKENS, group=dist.group.WORLD, data_group=None, rank=info.rank,
        device=torch.device("cpu"),
    )  # fmt: skip


def refused(info, cap_bytes, case):
    """Return what a refusal of a cap says to be needed."""
    with pytest.raises(PlanError, match=f"the cap is {cap_bytes:,}; raise it to") as raised:
        runner_of(info, cap_bytes, **case)
    (needed,) = re.findall(r"raise it to ([\d,]+), or", str(raised.value))
    return int(needed.replace(",", ""))


def rank_meets_caps(info, case, shares):
    needed = refused(info, 1, case)
    assert refused(info, needed - 1, case) == needed
    peaks = []
    for share in shares:
        cap = int(needed * share)
        runner = runner_of(info, cap, **case)
        with ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1) as loader:
            for _, batch in zip(range(2), loader, strict=False):
                runner.evaluate(batch)
                runner.forward_backward(batch)  # MemoryCapError, if the plan had left something out
        assert runner.worker.arena.peak_bytes <= cap
        peaks.append(runner.worker.arena.peak_bytes)
        runner.close()
    return needed, peaks


CASES = {
    "one rank": (1, {"layers": 3, "open_slots": 1}),
    "three ranks": (3, {"layers": 8, "open_slots": 1}),
    "open slots, tied": (2, {"layers": 5, "open_slots": 2, "rounds": 2}),
    "all open": (3, {"layers": 4, "open_slots": 3, "rounds": 2}),
    "left to the planner": (2, {"layers": 4, "open_slots": None, "rounds": None}),
    "adapters behind": (2, {"layers": 5, "open_slots": 1, "lora": LoraConfig(rank=2, first_layer=2)}),
    "frozen in front": (2, {"layers": 4, "open_slots": 2, "frozen": ("model.embed_tokens", "model.layers.0.")}),
}
QUICK = ("three ranks", "open slots, tied", "adapters behind")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_what_is_planned_under_a_cap_runs_under_it_and_what_is_refused_says_what_would_do(case):
    ranks, options = case
    found = run_ranks(rank_meets_caps, ranks, options, (1.0, 1.03, 1.3))
    ((needed, _),) = {(needed, 0) for needed, _ in found}
    # Not far from what is used: nothing is counted several times.
    assert max(peaks[0] for _, peaks in found) > 0.6 * needed


def rank_needs(info, case):
    return refused(info, 1, case)


def test_adapters_need_no_gradients_of_what_is_frozen():
    whole = run_ranks(rank_needs, 1, {"layers": 3, "open_slots": 1})[0]
    adapters = run_ranks(rank_needs, 1, {"layers": 3, "open_slots": 1, "lora": LoraConfig(rank=2)})[0]
    assert adapters < whole
