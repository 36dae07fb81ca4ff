"""Op programs: golden ones, common programs against brute force, alignment with dummies."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chunkflow.errors import PlanError
from chunkflow.order import envelope, order_jobs
from chunkflow.program import align, common_program, depths, job_program, local_program, operations
from chunkflow.records import Chunk, Segment


def group(count, number=0):
    return [Chunk((Segment(number, 8 * n, 8, 0),), number, n, count) for n in range(count)]


def standalone(num):
    return [Chunk((Segment(1000 + n, 0, 8, 0),)) for n in range(num)]


@pytest.mark.parametrize(
    ("chunks", "retain", "program"),
    [
        (standalone(2), 1, "FBFB"),
        (standalone(2), 4, "FBFB"),
        (group(2), 1, "fFBFB"),
        (group(4), 1, "fffFBFBFBFB"),
        (group(4), 2, "ffFFBBFBFB"),
        (group(5), 3, "ffFFFBBBFBFB"),
        (group(3), 3, "FFFBBB"),
        (group(3), 9, "FFFBBB"),
        (group(3, 0) + group(2, 1) + standalone(1), 2, "fFFBBFB" + "FFBB" + "FB"),
        ([], 1, ""),
    ],
)
def test_golden_programs(chunks, retain, program):
    assert local_program(chunks, retain) == program


def test_the_last_chunks_are_kept_and_backward_descends():
    assert list(operations(standalone(1) + group(4), 2)) == [
        ("F", 0), ("B", 0),
        ("f", 1), ("f", 2), ("F", 3), ("F", 4),
        ("B", 4), ("B", 3), ("F", 2), ("B", 2), ("F", 1), ("B", 1),
    ]  # fmt: skip


@given(st.lists(st.integers(1, 6), max_size=5), st.integers(1, 4))
def test_every_chunk_runs_backward_once_on_a_graph_made_before(counts, retain):
    chunks = [chunk for number, n in enumerate(counts) for chunk in (group(n, number) if n > 1 else standalone(1))]
    alive, done = set(), []
    for op, position in operations(chunks, retain):
        if op == "F":
            alive.add(position)
        elif op == "B":
            alive.remove(position)
            done.append(position)
        assert len(alive) <= retain
    assert not alive
    assert sorted(done) == list(range(len(chunks)))


def test_a_torn_group_is_refused():
    with pytest.raises(PlanError, match=r"chunk 0 begins group 0 of 3 chunks.*must stand together, ascending"):
        local_program(group(3)[:2], 1)
    with pytest.raises(PlanError, match=r"chunk 0 begins group 0 of 2 chunks"):
        local_program(group(2)[::-1], 1)


def rows(*, max_size, max_depth=3):
    return st.lists(st.integers(0, max_depth), max_size=max_size).map(text)


def text(blocks):
    return "".join("F" * depth + "B" * depth if depth else "f" for depth in blocks)


def numbered(program):
    return [(op, n) for n, op in enumerate(program)]


def is_subsequence(short, long):
    rest = iter(long)
    return all(op in rest for op in short)


def check_aligned(program, own):
    """The rank's own ops in order, dummies elsewhere, and a dummy graph for every dummy backward."""
    aligned = align(program, numbered(own))
    assert "".join(op for op, _ in aligned) == program
    assert [(op, n) for op, n in aligned if n is not None] == numbered(own)
    graphs = 0
    for op in (op for op, n in aligned if n is None):
        graphs += {"f": 0, "F": 1, "B": -1}[op]
        assert graphs >= 0
    assert graphs == 0


@given(st.lists(rows(max_size=12), min_size=1, max_size=5))
@example(["FFBB", "FBFB"])
@example(["FFFBBB", "FBFFBBFB", "ffFFBB"])
def test_a_common_program_runs_every_rank(programs):
    common = common_program(programs)
    assert len(common) <= sum(map(len, programs))
    for program in programs:
        assert is_subsequence(program, common)
        check_aligned(common, program)
    assert common_program(programs[::-1]) == common


def runnable(string, own):
    """Whether some embedding of `own` leaves dummies of which every B has its F: all embeddings are tried."""
    states = {(0, 0)}
    for op in string:
        dummy = {"f": 0, "F": 1, "B": -1}[op]
        taken = {(n + 1, graphs) for n, graphs in states if n < len(own) and own[n] == op}
        states = taken | {(n, graphs + dummy) for n, graphs in states if graphs + dummy >= 0}
    return (len(own), 0) in states


SMALL = sorted({text(blocks) for n in range(4) for blocks in product(range(4), repeat=n) if len(text(blocks)) <= 6})


@pytest.mark.parametrize("a", SMALL)
def test_of_two_the_common_program_is_the_shortest_that_can_run(a):
    for b in SMALL:
        shortest = len(common_program([a, b]))
        assert runnable(common_program([a, b]), a)
        assert shortest >= max(len(a), len(b))
        for string in SHORTER_STRINGS.get(shortest, ()):
            assert not (runnable(string, a) and runnable(string, b)), string


def balanced_strings(length):
    """All strings of the alphabet in which no backward precedes its forward and none is missing."""
    if length == 0:
        return [("", 0)]
    longer = []
    for head, graphs in balanced_strings(length - 1):
        longer += [(head + "f", graphs), (head + "F", graphs + 1)]
        longer += [(head + "B", graphs - 1)] if graphs else []
    return longer


# A shorter one could be padded with f to one op less, so that length alone has to be searched.
SHORTER_STRINGS = {n + 1: [string for string, graphs in balanced_strings(n) if not graphs] for n in range(10)}


def test_thousands_of_chunks_on_eight_ranks_have_a_common_program():
    programs = [
        "".join(local_program(group(40 + 7 * rank + n), 1 + rank % 3) for n in range(12)) + "FB" * 700
        for rank in range(8)
    ]
    common = common_program(programs)
    for program in programs:
        check_aligned(common, program)
    assert len(common) < 1.35 * max(map(len, programs))


def test_rows_too_long_for_one_table_still_have_a_common_program():
    a, b = "f" * 3000 + "FB" * 3000, "FFBB" * 1500 + "f" * 1000
    common = common_program([a, b])
    check_aligned(common, a)
    check_aligned(common, b)
    assert len(common) <= len(a) + len(b)


@given(st.integers(1, 9), st.integers(1, 4))
def test_the_program_of_a_job_needs_only_its_count(count, retain):
    assert job_program(count, retain) == local_program(group(count), retain)


@given(st.lists(st.lists(st.integers(1, 7), max_size=6), min_size=1, max_size=4), st.integers(1, 4))
def test_groups_side_by_side_run_every_rank(counts, retain):
    every = sorted(((count, rank) for rank, mine in enumerate(counts) for count in mine), reverse=True)
    sizes, rank = np.array(every, dtype=np.int64).reshape(-1, 2).T
    jobs = order_jobs(rank, sizes, world_size=len(counts), retain=retain)
    ordered = [sizes[mine].tolist() for mine in jobs]
    assert [sorted(mine) for mine in ordered] == [sorted(mine) for mine in counts]
    program = envelope(ordered, retain=retain)
    for mine in ordered:
        check_aligned(program, "".join(job_program(count, retain) for count in mine))


def test_alike_ranks_have_no_dummies():
    assert common_program(["fFBFBFB", "FBFB", "", "fFBFBFB"]) == "fFBFBFB"
    assert align("fFBFB", []) == [("f", None), ("F", None), ("B", None), ("F", None), ("B", None)]


def test_misfits_are_refused_before_anything_runs():
    own = list(operations(group(3), 1))
    with pytest.raises(PlanError, match=r"fFBFB has no place for the last 4 blocks of this rank, from f of chunk 1"):
        align("fFBFB", own)
    with pytest.raises(PlanError, match=r"no place for the last 1 blocks.*with its retain"):
        align("FBFBFB", operations(group(2), 2))


@pytest.mark.parametrize("program", ["FFB", "BF", "FBx", "fB", "FBB"])
def test_what_is_no_program_is_refused(program):
    with pytest.raises(PlanError, match=r"not an op program at character \d: .*as many B as F"):
        depths(program)
