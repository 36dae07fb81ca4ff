"""Plans as values: what they refuse, how they are written, and the orders they stand for."""

import pytest

from moe.errors import PlanError
from moe.plan import PLAIN, LayerPlan, Op, check_same, inter_order, intra_order


def test_a_plan_reads_itself_back():
    plan = LayerPlan(3, 5, "ready", 2, 1, 4096, 0.25, 0.5, 1.0, ("because", "so"))
    assert LayerPlan.from_json(plan.to_json()) == plan
    assert LayerPlan.from_json(PLAIN.to_json()) == PLAIN == LayerPlan(1, 1)
    assert '"predicted_s": 0.75' in plan.to_json()
    head = "chunks of a layer: forward r=3, backward r=5; order ready; predicted 750.00 ms, serial 1000.00 ms"
    assert str(plan) == f"{head}\n  - because\n  - so"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "forward_chunks is 0; it must be an integer from 1 to 1024"),
        ((1, 10**9), "backward_chunks is 1000000000; it must be an integer from 1 to 1024"),
        ((1, 1, "ready", 1, 2**80), "backward_lag is"),
        ((1, 1, "fifo", 1, 1, 2**63), "gradient_bytes is"),
        ((1, 1, "fifo", 1, 1, 0, "fast"), "predicted_forward_s is 'fast'; it must be a number of seconds"),
        ((1, 1, "fifo", 1, 1, 0, 0.0, float("nan")), "predicted_backward_s is nan"),
        ((1, 1, "fifo", 1, 1, 0, 0.0, 0.0, float("inf")), "predicted_serial_s is inf"),
        ((1, 1, "fifo", 1, 1, 0, 10**400), "predicted_forward_s is 1000"),
        ((1, True), "backward_chunks is True"),
        ((1, 2.0), "backward_chunks is 2.0"),
        ((1, 1, "lifo"), "order is 'lifo'; choose 'fifo' or 'ready'"),
        ((1, 1, "ready", 0), "forward_lag is 0"),
        ((1, 1, "fifo", 1, 1, -1), "gradient_bytes is -1"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        LayerPlan(*arguments)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "[" * 100_000, '{"forward_chunks": 1}', '{"forward_chunks": 1, "chunks": 2}']
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match="not a layer plan"):
        LayerPlan.from_json(text)


def test_orders():
    def short(ops):
        return " ".join(f"{op.name[0]}{op.chunk}" for op in ops)

    assert short(intra_order(3, "fifo")) == "g0 g1 g2 s0 s1 s2"
    assert short(intra_order(3, "ready", 1)) == "g0 g1 s0 g2 s1 s2"
    assert short(intra_order(5, "ready", 2)) == "g0 g1 g2 s0 g3 s1 g4 s2 s3 s4"
    assert short(intra_order(1, "ready")) == "g0 s0"
    assert short(inter_order(2)) == "d0 d1 c0 c1"
    assert inter_order(2, gradient=True)[2] == Op("gradient", 0)
    for chunks in range(1, 9):
        for lag in range(1, 10):
            ops = intra_order(chunks, "ready", lag)
            assert sorted(ops) == sorted(intra_order(chunks, "fifo"))
            assert all(ops.index(Op("gather", i)) < ops.index(Op("scatter", i)) for i in range(chunks))


def test_ranks_with_different_plans_are_named():
    check_same([PLAIN, LayerPlan(1, 1, reasons=("another reason is no difference",))])
    with pytest.raises(PlanError, match=r"rank 0 has the plan \(1, 1, .*rank 2 has \(1, 2, .*broadcast its plan"):
        check_same([PLAIN, PLAIN, LayerPlan(1, 2)])
