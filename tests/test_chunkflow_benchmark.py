"""The ways of `benchmarks.chunkflow` do the same work, and its claims follow from its rows."""

import numpy as np
import pytest
import torch

from benchmarks.chunk_memory import slope_claims
from benchmarks.chunk_memory_case import Case, key_value_bytes
from benchmarks.chunkflow_bound import Rates
from benchmarks.chunkflow_report import claims_of
from benchmarks.chunkflow_ways import WAYS, Job
from benchmarks.chunkflow_work import Load, Shape, causal, data_set, model_of, samples_of

LENGTHS = [70, 3, 9, 2, 14, 21, 5]
SHAPE = Shape(64, 2, 128)


def trained(way, **setting):
    """Loss, gradients, and the work, of one process."""
    compiled = bool(setting["compiled"])
    models = {(r, compiled): model_of(SHAPE, recompute=r, compiled=compiled) for r in (False, True)}
    work = WAYS[way](Job(samples_of(LENGTHS, SHAPE), 0, 1, models, 1e-3), setting)
    loss = work.run()
    model = models[way != "ours", compiled]
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()]), work


@pytest.mark.parametrize("compiled", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ways_that_train_every_token_do_the_same_work(compiled):
    loss, grads, work = trained("ours", chunk_tokens=16, retain=2, compiled=compiled)
    assert work.tokens == sum(LENGTHS)
    # 70 tokens are five chunks, three of which run forward twice.
    assert work.load.forward_tokens == sum(LENGTHS) + 3 * 16
    assert work.load.backward_pairs == sum(map(causal, LENGTHS))
    for way, setting in (("single", {}), ("padded", {"batch": 2})):
        other_loss, other_grads, other = trained(way, **setting, compiled=compiled)
        assert other.tokens == sum(LENGTHS)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other_grads, grads, rtol=1e-3, atol=1e-6)
        assert other.load.forward_tokens == 2 * other.load.backward_tokens >= 2 * sum(LENGTHS)


def test_packing_loses_what_is_longer_than_a_row():
    _, _, work = trained("packed", row_tokens=32, recompute=1, compiled=0)
    assert work.tokens == sum(LENGTHS) - (70 - 32)


def test_lengths_are_what_the_tables_say():
    for name in ("lmsys", "stdlib"):
        data = data_set(name, quick=False)
        assert 16_000 <= data.lengths.max() <= 32_768
        assert data.lengths.min() >= 2
        np.testing.assert_array_equal(data.lengths, data_set(name, quick=False).lengths)


def row(way, seconds, tokens=100, part="lmsys", bound_s=1.0):
    return {
        "part": part, "quick": False, "way": way, "setting": {}, "seconds": seconds, "tokens": tokens, "loss": 1.0,
        "peak_bytes": 1, "bound_s": bound_s, "balanced_s": bound_s, "code_s": bound_s,
    }  # fmt: skip


def test_claims_are_medians_over_rounds_beside_their_bounds():
    rows = [row("ours", s) for s in (1.0, 2.0, 4.0)] + [row("single", s, bound_s=1.5) for s in (3.0, 3.0, 3.0)]
    rows += [row("padded", 10.0) for _ in range(3)] + [row("packed", 2.0, tokens=60) for _ in range(3)]
    by_name = {c.name: c for c in claims_of(rows)}
    share = by_name["lmsys: time that the hardware needs over measured time"]
    assert share.value == 0.5
    assert not share.met
    single = by_name["lmsys: tokens/s over one sequence a micro-batch, round-robin, recompute"]
    assert (single.value, single.bound, single.met) == (1.5, 1.5, True)
    packed = by_name["lmsys: tokens/s over TRL's packing (bfd), at its best setting"]
    assert packed.value == pytest.approx(100 / 2 / (60 / 2))
    assert "loses 40 of 100 tokens" in packed.note


def test_slope_is_in_bytes_of_keys_values_and_gradients():
    case = Case(mode="chunks", num_tokens=0, chunk_tokens=128, layers=1)
    each = key_value_bytes(case, 1)
    fields = {"mode": "chunks", "chunk_tokens": 128, "hidden": 128, "layers": 1, "vocabulary": 4096, "retain": 1}
    for extra, met in ((1.0, True), (1.2, False)):
        rows = [{**fields, "num_tokens": n, "peak_bytes": 5e6 + n * each * extra} for n in (4096, 8192, 32_768)]
        (claim,) = slope_claims(rows)
        assert claim.value == pytest.approx(extra)
        assert claim.met is met


def test_a_rank_takes_the_sum_of_its_operations():
    rates = Rates(1.0, 2.0, 4.0, 8.0, 16.0, 100.0, 200.0)
    load = Load(1, 1, 1, 1, 1) + Load(forward_tokens=1)
    assert rates.seconds(load) == 32
    assert rates.code_seconds(load) == 100 * 2 + 200 + 4 + 8 + 16
