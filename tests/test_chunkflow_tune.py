"""Tuning: the fits find what made the numbers, the proposal is the best there is, and a real run agrees."""

import json

import pytest

from chunkflow.errors import ChunkflowError
from chunkflow.fit import CostModel, OpTime
from chunkflow.tune import Measured, anchored_peak, cases, fit_memory, peak, propose, seconds, tune
from chunkflow.tune_process import measured

MEMORY = (3e6, 900.0, 5000.0, 2000.0)
TRIED = {"sizes": [256, 512, 1024, 2048, 4096], "retain": range(1, 9)}
COST = CostModel(OpTime(1e-3, 2e-6, 1e-10, 0.0, 9), OpTime(2e-3, 5e-6, 2e-10, 0.0, 9))


def test_memory_is_fitted_from_the_grid():
    rows = [Measured(c, k, n, 1.0, round(peak(MEMORY, c, k, n))) for c, k, n in cases([128, 256, 512], [1, 2, 4])]
    found, residual = fit_memory(rows)
    assert found == pytest.approx(MEMORY, rel=1e-3)
    assert residual < 1e-4


def test_a_peak_is_predicted_from_a_shorter_sequence():
    """What the fit gets wrong about (chunk_tokens, retain) is in the measurement; only keys and values are added."""
    short = Measured(256, 2, 1024, 1.0, round(peak(MEMORY, 256, 2, 1024)) + 7_000_000)
    assert anchored_peak(MEMORY, short, 1024) == short.peak_bytes
    assert anchored_peak(MEMORY, short, 4096) == pytest.approx(peak(MEMORY, 256, 2, 4096) + 7_000_000)


def test_time_of_a_sequence_is_its_ops():
    # 2.5 chunks of 100, retain 1: two chunks run forward twice.
    pairs = [5050, 100 * 100 + 5050, 50 * 200 + 1275]
    forward = [COST.forward.seconds(t, p) for t, p in zip([100, 100, 50], pairs, strict=True)]
    backward = [COST.backward.seconds(t, p) for t, p in zip([100, 100, 50], pairs, strict=True)]
    assert seconds(COST, 100, 1, 250) == pytest.approx(sum(forward) + sum(forward[:2]) + sum(backward))
    assert seconds(COST, 100, 3, 250) == pytest.approx(sum(forward) + sum(backward))


def test_the_proposal_is_the_fastest_that_fits():
    fixed, longest = 50_000_000, 16_384
    for cap in (95_000_000, 120_000_000, 400_000_000):
        size, kept = propose(COST, MEMORY, fixed, cap_bytes=cap, longest=longest, **TRIED)
        assert fixed + peak(MEMORY, size, kept, longest) <= cap
        for other in TRIED["sizes"]:
            for more in TRIED["retain"]:
                if fixed + peak(MEMORY, other, more, longest) <= cap:
                    assert seconds(COST, size, kept, longest) <= seconds(COST, other, more, longest)
    first = propose(COST, MEMORY, fixed, cap_bytes=120_000_000, longest=longest, **TRIED)
    second = propose(COST, MEMORY, fixed, cap_bytes=120_000_000, longest=longest, **TRIED, refused={first})
    assert second != first
    with pytest.raises(ChunkflowError, match=r"nothing fits: 16384 tokens need \d+ MiB at chunk_tokens 256 and retain"):
        propose(COST, MEMORY, fixed, cap_bytes=60_000_000, longest=longest, **TRIED)


def test_what_was_measured_and_does_not_hold_is_named_when_nothing_else_is_left():
    few = {"sizes": [256], "retain": [1, 2]}
    with pytest.raises(ChunkflowError, match=r"of .* \[\(256, 1\), \(256, 2\)\] none stays under"):
        propose(COST, MEMORY, 0, cap_bytes=1 << 40, longest=2048, refused={(256, 1), (256, 2)}, **few)


def model_of(folder):
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


@pytest.mark.slow
def test_the_proposal_is_one_of_those_that_were_asked_for(tmp_path):
    found = tune(model_of(tmp_path), cap_bytes=4 << 30, longest=512, chunk_tokens=[32, 64], retain=[1])
    assert (found.chunk_tokens, found.retain) in [(32, 1), (64, 1)]
    assert {(row.chunk_tokens, row.retain) for row in found.rows} == {(32, 1), (64, 1)}


@pytest.mark.slow
def test_a_small_model_is_tuned_for_real(tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = []
    found = tune(
        str(tmp_path / "config.json"), cap_bytes=2 << 30, longest=2048, chunk_tokens=[128, 256], retain=[1, 2],
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(row.tokens for row in found.rows) + 2048
    assert len({done for done, _ in told}) > 4  # told inside a measurement, too
    assert found.measured_peak_bytes <= found.cap_bytes
    assert abs(found.measured_peak_bytes / found.predicted_peak_bytes - 1) < 0.1
    assert found.cost.forward.count > 6
    assert json.loads(json.dumps(found.to_json()))["holds"] is True
    assert "proposed for 2048 tokens" in str(found)


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(ChunkflowError, match=r"measuring .* failed: .*no causal LM could be loaded"):
        tune(str(tmp_path / "absent"), cap_bytes=1, longest=64, chunk_tokens=[16], retain=[1])
    with pytest.raises(ChunkflowError, match="dtype is 'int8'"):
        tune("x", cap_bytes=1, longest=64, chunk_tokens=[16], retain=[1], dtype="int8")


def test_learned_positions_bound_what_is_measured(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = str(tmp_path / "config.json")
    told = "measuring .* failed: longest is 41, and the model has learned positions for 40"
    with pytest.raises(ChunkflowError, match=told):
        tune(model, cap_bytes=1 << 30, longest=41, chunk_tokens=[16], retain=[1])
    rows = measured(model, "float32", cases([16], [1]), lambda _: None, longest=40)["rows"]
    assert [row["tokens"] for row in rows] == [40, 40, 40]  # of 48, 256 and 128


def test_a_fit_without_time_a_token_names_no_pair_cost():
    lost = CostModel(OpTime(1e-3, 0.0, 1e-10, 0.0, 9), OpTime(2e-3, 0.0, 2e-10, 0.0, 9))
    assert "pair_cost not measurable" in str(lost)
    assert f"pair_cost {COST.pair_cost:.3g}" in str(COST)
