"""What `benchmarks.job` makes of its measurements, and that both sides of it train the same tokens."""

import json

import numpy as np
import pytest
import torch

from benchmarks.chunkflow_bound import Rates
from benchmarks.chunkflow_work import Load, causal
from benchmarks.job import main
from benchmarks.job_data import Tokens, drawn, flags, unshifted
from benchmarks.job_ours import load_of
from benchmarks.job_peer import Collator, by_step, rows_of
from benchmarks.job_plain import WAYS, periods_of, tensors
from benchmarks.job_report import FULL, claims_of, print_tables
from benchmarks.job_startup import beyond
from benchmarks.job_train import bound_seconds, loss_of, peak_of
from chunkflow import ChunkLoader, MemorySource
from chunkflow.sources import shifted

LENGTHS = (70, 3, 9, 12, 14, 21, 5, 30)


def samples():
    """Of each the first two tokens are a prompt."""
    made = []
    for number, length in enumerate(LENGTHS):
        ids = np.arange(length, dtype=np.int64) + number
        labels = np.where(np.arange(length) < 2, -100, ids)
        made.append(shifted(ids, labels))
    return made


def tokens(tmp_path):
    return Tokens(tmp_path / "x.jsonl", tuple(unshifted(sample) for sample in samples()))


def test_labels_stand_at_their_own_tokens_for_transformers():
    sample = samples()[1]
    assert unshifted(sample) == {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}


def test_the_peer_scores_the_tokens_that_chunks_score(tmp_path):
    data, collator = tokens(tmp_path), Collator()
    rows = rows_of(data)
    batches = [collator(rows[at : at + 2]) for at in range(0, len(rows), 2)]
    scored = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert scored == data.scored == sum(length - 2 for length in LENGTHS)
    assert [number for batch in collator.batches for number, _, _ in batch] == list(range(len(LENGTHS)))
    assert batches[0]["attention_mask"].sum() == 73
    loader = ChunkLoader(MemorySource(samples()), chunk_tokens=16, global_batch=4, rank=0, world_size=1)
    assert sum(loader.plan(step).denominator for step in range(2)) == data.scored


def test_loads_count_recompute_padding_and_scored_tokens():
    collator = Collator()
    rows = [{**unshifted(sample), "number": 0} for sample in samples()]
    collator(rows[:2]), collator(rows[2:3])
    (load,) = by_step(collator.batches, accumulate=2)
    assert load.backward_tokens == load.head_tokens == 2 * 70 + 9
    assert load.forward_tokens == 2 * load.backward_tokens
    assert load.backward_pairs == 2 * 70**2 + causal(9)  # a mask hides pairs that the kernel computes
    source = MemorySource(samples())
    loader = ChunkLoader(source, chunk_tokens=16, global_batch=len(LENGTHS), rank=0, world_size=2)
    ours = load_of(loader.plan(0), 0, source) + load_of(loader.plan(0), 1, source)
    assert ours.head_tokens == sum(length - 2 for length in LENGTHS)
    assert ours.backward_tokens == sum(LENGTHS)
    # 70 tokens are five chunks, 21 and 30 two; all but the last of each run forward twice
    assert sum(LENGTHS) < ours.forward_tokens <= sum(LENGTHS) + (4 + 1 + 1) * 16
    assert ours.backward_pairs == sum(map(causal, LENGTHS))


def test_the_bound_is_of_the_slowest_rank_of_each_step():
    rates = Rates(0, 1.0, 0, 0, 0, 0, 0)
    loads = [[Load(backward_tokens=n) for n in row] for row in ((1, 5), (3, 3))]
    assert bound_seconds(rates, loads) == (3 + 5, 2 + 4)


def test_rows_for_plain_loops_are_those_of_the_chunks():
    source = MemorySource([shifted(np.arange(8, dtype=np.int64) + n, None) for n in range(4)])
    with ChunkLoader(source, chunk_tokens=16, global_batch=4, rank=0, world_size=1) as loader:
        pieces, targets = tensors(next(iter(loader)), rows=3, row_tokens=8)
    assert [ids.shape for ids, _ in pieces] == [(3, 8), (1, 8)]
    assert targets == 4 * 7
    for ids, labels in pieces:
        assert torch.equal(ids[:, 1:], labels[:, 1:])
        assert (labels[:, 0] == -100).all()
    assert periods_of([0.0, 5.0, 6.0, 8.0]) == [1.0, 2.0]


def test_the_longest_is_among_those_drawn():
    lines = ["x" * n for n in (3, 99, 5, 7, 2)]
    for seed in range(5):
        chosen = drawn(lines, 3, seed=seed)
        assert len(set(chosen)) == 3
        assert lines[1] in chosen


def test_settings_become_flags():
    assert flags({"a.b": 1, "c": "x", "d": [], "e": None}) == ["--a.b", "1", "--c", "x", "--d", "[]", "--e", "null"]


def test_peaks_are_the_largest_of_all_steps_and_what_follows():
    metrics = [{"step": 0}, {"ranks": {"peak_bytes": [5, 9]}}, {"ranks": {"peak_bytes": [7, 2]}}]
    ranks = [{"peak_bytes": 6, "metrics": metrics}, {"peak_bytes": 4}]
    assert [peak_of(ranks, 0), peak_of(ranks, 1)] == [7, 9]


def test_mean_losses_are_of_all_ranks():
    assert loss_of([{"loss": 3.0}, {"loss": 1.0}]) == 2.0
    assert loss_of([{"losses": [4.0, 2.0]}, {"losses": [4.0, 2.0]}]) == 3.0


def test_start_up_is_beyond_a_bare_script_and_without_the_first_evaluation():
    bare = [{"launched": 0.0, "imported": 4.0, "loaded": 6.0}, {"launched": 0.0, "imported": 4.0, "loaded": 7.0}]
    rank = {"launched": 100.0, "importing": 103.0, "imported": 106.0, "prepared": [[107.0, 110.0]],
            "assembled": 111.0, "steps": [115.0], "evaluating_s": 3.0}  # fmt: skip
    found = beyond(bare, [rank, rank])
    assert (found["seconds"], found["bare_s"], found["evaluating_s"]) == (15 - 3 - 7, 7, 3)
    assert sum(value for key, value in found.items() if key.startswith("moment.")) == 15 - 3


def train_row(way, number, seconds, *, bound_s=4.0, peak=900, scored=100):
    return {
        "part": "train", "quick": False, "round": number, "way": way, "setting": {}, "seconds": seconds,
        "scored": scored, "expected": 100, "tokens": 150, "longest": 70, "steps": 20, "global_batch": 8,
        "bound_s": bound_s, "balanced_s": bound_s, "weights_s": 0.5, "cap_bytes": 1000, "peak_bytes": [peak, peak - 1],
        "loss": 1.0, "parts": {"compute": 3.0} if way == "ours" else {},
    }  # fmt: skip


def features_row(way, number, seconds, loss=2.0):
    return {"part": "features", "quick": False, "round": number, "way": way, "seconds": seconds, "global_batch": 4,
            "row_tokens": 8, "parts": {"compute": 0.5} if way == FULL else {}, "losses": [loss, loss]}  # fmt: skip


def startup_row(number, seconds):
    return {"part": "startup", "quick": False, "case": "a", "round": number, "cached": number > 0, "seconds": seconds,
            "first_step_s": 20.0, "bare_s": 8.0, "evaluating_s": 1.0, "moment.imports": 3.0}  # fmt: skip


def test_claims_are_medians_over_rounds_beside_their_bounds(capsys):
    rows = [train_row("ours", n, s) for n, s in enumerate((4.0, 5.0, 8.0))]
    rows += [train_row("peer", n, s, bound_s=6.0, peak=1100) for n, s in enumerate((12.0, 12.0, 12.0))]
    rows += [features_row(FULL, 0, 1.02), features_row(next(iter(WAYS)), 0, 1.0), features_row("chunks alone", 0, 1.1)]
    rows += [startup_row(0, 30.0), startup_row(1, 9.0), startup_row(2, 8.0)]
    met = {claim.name: claim for claim in claims_of(rows)}
    gain = met["train: scored tokens/s over Trainer's"]
    assert (gain.value, gain.bound, gain.met) == (pytest.approx(12 / 5), 1.5, False)
    assert met["train: time of products and attention over measured time"].value == pytest.approx(0.8)
    assert met["train: the same and AdamW, the sum of gradients"].met
    assert not met["train: peak of the hungriest rank"].met
    assert met["train: runs that scored other tokens"].met
    assert met["features: a step with everything on over the best plain loop's"].met
    assert met["features: largest relative difference of a step's losses"].met
    assert not met["startup: a, nothing cached, start to first step beyond a bare script"].met
    assert met["startup: a, data cached, start to first step beyond a bare script"].value == 8.5
    print_tables(rows)
    assert "the rest: records" in capsys.readouterr().out


def test_other_tokens_and_other_losses_are_no_equal_work():
    rows = [train_row("ours", 0, 4.0), train_row("peer", 0, 12.0, scored=99)]
    rows += [features_row(FULL, 0, 1.0), features_row("chunks alone", 0, 1.0)]
    rows += [features_row(next(iter(WAYS)), 0, 1.0, loss=2.1)]
    met = {claim.name: claim.met for claim in claims_of(rows)}
    assert not met["train: runs that scored other tokens"]
    assert not met["features: largest relative difference of a step's losses"]


def test_a_report_needs_no_measurement(tmp_path, capsys):
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"rows": [startup_row(0, 3.0), startup_row(1, 2.0)]}))
    with pytest.raises(SystemExit, match="0"):
        main(["--report", "--json", str(path)])
    assert len(json.loads(path.read_text())["claims"]) == 2
    assert "bare script" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_quick_form_measures_equal_work(tmp_path):
    path = tmp_path / "job.json"
    with pytest.raises(SystemExit):  # targets may be missed on a busy machine
        main(["--quick", "--json", str(path)])
    report = json.loads(path.read_text())
    assert {row["part"] for row in report["rows"]} == {"train", "features", "startup"}
    met = {claim["name"]: claim["met"] for claim in report["claims"]}
    assert met["train, quick: runs that scored other tokens"]
    assert met["features, quick: largest relative difference of a step's losses"]
