"""What `benchmarks.moe` makes of its measurements: sittings put together, hidden gradients, claims met and missed."""

import json

import pytest

from benchmarks.moe import merged
from benchmarks.moe_claims import claims_of
from benchmarks.moe_layers import FAMILIES, grid, models, scaled
from benchmarks.moe_rank import load_of, measured_hidden, planned_hidden
from moe.cost import Line, Profile
from moe.issue import Span
from moe.plan import LayerPlan


def row(layer="a", share=0.5, *, ours=1.0, fixed=1.2, none=1.6, hidden=0.9):
    return {
        "part": "grid", "layer": layer, "share_target": share, "share": share, "ours_s": ours, "fixed_s": fixed,
        "none_s": none, "predicted_s": 1.0, "predicted_fixed_s": 1.2, "predicted_none_s": 1.6, "bound_s": 0.8,
        "hidden": hidden, "hidden_planned": 0.9,
    }  # fmt: skip


def test_a_sitting_replaces_what_it_measured_again_and_keeps_the_rest(tmp_path):
    path = tmp_path / "moe.json"
    assert merged(path, [row()]) == [row()]
    path.write_text(json.dumps({"rows": [row("a"), row("a", 0.7), row("b")]}))
    again = row("a", 0.7, ours=0.9)
    assert merged(path, [again]) == [row("a"), row("b"), again]


def test_hidden_is_the_part_of_all_slices_beside_experts_or_the_other_link():
    spans = [
        Span("inter", "1", "gradient", 0, 100),
        Span("compute", "1", "backward expert 0", 20, 60),
        Span("intra", "1", "backward gather 1", 50, 70),
        Span("inter", "flush", "gradient", 200, 300),
        Span("inter", "1", "backward combine 0", 100, 120),
    ]
    assert measured_hidden(spans) == pytest.approx(50 / 200)
    assert measured_hidden(spans[1:2]) == 0.0


def test_planned_hidden_is_read_from_the_predicted_timeline():
    link = Line(0.0, 1e-8)
    profile = Profile(all_to_all=link, all_reduce=link, expert_forward=Line(0, 1e-6), expert_backward=Line(0, 2e-6))
    layer = scaled(FAMILIES[0], tokens=4096, exchange_bytes=1 << 20)
    load = load_of(layer, expert_s=1.0)  # so long that everything fits beside it
    hidden, sent = planned_hidden(profile, load, LayerPlan(2, 2, gradient_bytes=layer.gradient_bytes))
    assert hidden == sent == pytest.approx(layer.gradient_bytes * 1e-8)
    assert planned_hidden(profile, load, LayerPlan(2, 2)) == (0.0, 0.0)


def test_claims_are_met_and_missed():
    good = {claim.name: claim for claim in claims_of([row(), row("b")], quick=True)}
    assert all(claim.met for claim in good.values())
    bad = {claim.name: claim for claim in claims_of([row(ours=1.3, hidden=0.5)] * 2, quick=False)}
    assert bad.keys() - good.keys() == {"layer configurations"}
    assert not any(claim.met for claim in bad.values())
    assert bad["against the better peer, worst"].value == pytest.approx(1.2 / 1.3)


def test_layers_keep_the_ratio_of_their_model():
    assert len(grid(quick=False)) * 3 >= 48
    ratios = {
        stack[0].name.split()[0]: stack[0].gradient_bytes / stack[0].exchange_bytes for stack in models(quick=False)
    }
    assert ratios == pytest.approx({"GPT-2-XL-MoE": 0.78, "Mixtral-8x7B": 1.25, "Qwen3-30B-A3B": 0.28}, rel=0.02)
