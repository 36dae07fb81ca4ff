"""Who writes what: everything once, by one who has it, balanced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.datafile import layout
from checkpointing.errors import SaveError, StateError
from checkpointing.plan import RankState, file_order, plan_save
from checkpointing.records import TensorSpec


def spec(name, *shape, dtype="F32", alias=None):
    return TensorSpec(name, dtype, shape, alias)


def ranks(*states):
    return [RankState(tuple(specs), values) for specs, values in states]


held_by = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(0, 5000), st.sampled_from(["F32", "BF16", "U8"])),
    max_size=12,
)


@given(held_by)
def test_every_tensor_is_written_once_by_a_rank_that_holds_it(held):
    states = [[spec(n, size, dtype=d) for n, (who, size, d) in held.items() if rank in who] for rank in range(4)]
    plan = plan_save(ranks(*((specs, {}) for specs in states)))
    written = [(one.name, rank) for rank, specs in enumerate(plan.writes) for one in specs]
    assert sorted(name for name, _ in written) == sorted(held)
    assert all(rank in held[name][0] for name, rank in written)
    assert plan == plan_save(ranks(*((specs[::-1], {}) for specs in states)))


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_replicated_bytes_balance_to_within_the_largest(sizes, world_size):
    specs = [spec(f"t{i}", size) for i, size in enumerate(sizes)]
    plan = plan_save(ranks(*[(specs, {})] * world_size))
    loads = [sum(one.num_bytes for one in mine) for mine in plan.writes]
    assert max(loads) - min(loads) <= max((one.num_bytes for one in specs), default=0)


def test_what_only_one_rank_has_counts_first():
    plan = plan_save(ranks(([spec("mine", 100), spec("both", 50)], {}), ([spec("both", 50)], {})))
    assert [[one.name for one in specs] for specs in plan.writes] == [["mine"], ["both"]]


@given(held_by)
def test_a_file_has_no_gaps_and_every_tensor_is_aligned(held):
    specs = file_order(spec(n, size, dtype=d) for n, (_, size, d) in held.items())
    placed = layout(specs, {"a": "b"})
    head = placed.head({"a": "bc"})  # metadata may grow a little
    assert len(head) % 4096 == 0
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    at = len(head)
    for one, (begin, end) in zip(specs, placed.ranges, strict=True):
        assert (begin, end - begin) == (at, one.num_bytes)
        assert begin % {"F32": 4, "BF16": 2, "U8": 1}[one.dtype] == 0
        at = end
    assert placed.end == at


def test_a_header_too_long_for_readers_is_refused():
    specs = [spec("n" * 10_000_000 + str(i), 1) for i in range(10)]
    with pytest.raises(SaveError, match=r"10 tensors make a header of 100.* bytes; 100000000 is the limit"):
        layout(specs, {})


def test_an_alias_counts_only_where_all_holders_agree():
    tied = [spec("a", 3), spec("b", 3, alias="a")]
    assert plan_save(ranks((tied, {}), (tied, {}))).aliases == {"b": "a"}
    plan = plan_save(ranks((tied, {}), ([spec("a", 3), spec("b", 3)], {})))
    assert plan.aliases == {}
    assert {one.name for specs in plan.writes for one in specs} == {"a", "b"}
    chain = plan_save(ranks((tied, {}), ([spec("b", 3), spec("c", 3, alias="b")], {})))
    assert chain.aliases == {"c": "b"}


def test_disagreements_are_named():
    for left, right, text in [
        (([spec("w", 2, 3)], {}), ([spec("w", 3, 2)], {}), r"'w' is F32 \[2, 3\] on rank 0 and F32 \[3, 2\] on rank 1"),
        (
            ([spec("w", 2)], {}),
            ([spec("w", 2, dtype="BF16")], {}),
            r"'w' is F32 \[2\] on rank 0 and BF16 \[2\] on rank 1",
        ),
        (
            ([], {"v": 1}),
            ([], {"v": 1.0}),
            r"value 'v' is 1 on rank 0 and 1\.0 on rank 1; .*a name with the rank in it",
        ),
        (([spec("w", 2)], {}), ([], {"w": 1}), r"'w' is a tensor on rank 0 and a value on rank 1"),
        (([], {"w": 1}), ([spec("w", 2)], {}), r"'w' is a tensor on rank 1 and a value on rank 0"),
    ]:
        with pytest.raises(StateError, match=text):
            plan_save(ranks(left, right))


def test_values_of_all_ranks_are_kept():
    assert plan_save(ranks(([], {"a": 1, "r.0": 2}), ([], {"a": 1, "r.1": 3}))).values == {"a": 1, "r.0": 2, "r.1": 3}
