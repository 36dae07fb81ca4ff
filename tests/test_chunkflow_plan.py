"""The plan of a step: its promises over many inputs, its text, and every rule broken once."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow.config import PlannerConfig
from chunkflow.errors import PlanError
from chunkflow.lengths import lmsys
from chunkflow.plan import StepPlan, plan_step
from chunkflow.program import align, operations
from chunkflow.records import Chunk, Segment

CONFIG = PlannerConfig(chunk_tokens=16, retain=2)


def plan(lengths, *, config=CONFIG, world_size=2, samples=None, step=3, denominator=7.5):
    samples = range(len(lengths)) if samples is None else samples
    return plan_step(step, samples, lengths, config=config, world_size=world_size, denominator=denominator)


cases = {
    "lengths": st.lists(st.integers(1, 70), min_size=1, max_size=30),
    "config": st.builds(PlannerConfig, chunk_tokens=st.integers(1, 24), retain=st.integers(1, 4)),
    "world_size": st.integers(1, 5),
}


@given(**cases)
def test_every_token_is_planned_once_and_every_rank_can_run(lengths, config, world_size):
    made = plan(lengths, config=config, world_size=world_size)
    tokens = [
        (s.sample, t)
        for chunks in made.ranks
        for chunk in chunks
        for s in chunk.segments
        for t in range(s.start, s.start + s.length)
    ]
    assert sorted(tokens) == [(sample, t) for sample, length in enumerate(lengths) for t in range(length)]
    assert len(made.ranks) == world_size
    made.validate(lengths)
    for chunks in made.ranks:
        assert all(chunk.num_tokens <= config.chunk_tokens for chunk in chunks)
        ran = [n for op, n in align(made.program, operations(chunks, config.retain)) if op == "B" and n is not None]
        assert sorted(ran) == list(range(len(chunks)))


@given(**cases)
def test_a_plan_reads_itself_back(lengths, config, world_size):
    made = plan(lengths, config=config, world_size=world_size, denominator=1 / 3)
    assert StepPlan.from_json(made.to_json()) == made


@given(cases["lengths"], st.randoms())
def test_chunks_depend_neither_on_world_size_nor_on_drawing_order(lengths, random):
    def chunks(made):
        return sorted((c for cs in made.ranks for c in cs), key=lambda c: (c.segments[0].sample, c.index))

    one = plan(lengths, world_size=1)
    order = list(range(len(lengths)))
    random.shuffle(order)
    shuffled = plan({n: lengths[n] for n in order}, samples=order, world_size=3)
    assert chunks(one) == chunks(shuffled)
    assert shuffled.samples == tuple(order)


def test_numpy_lengths_and_samples_give_plain_integers():
    lengths = lmsys(32, seed=0)
    made = plan(lengths, samples=np.arange(32), config=PlannerConfig(chunk_tokens=256))
    assert made == plan([int(x) for x in lengths], config=PlannerConfig(chunk_tokens=256))
    assert StepPlan.from_json(made.to_json()) == made


def test_more_ranks_than_chunks_leaves_ranks_with_dummies_only():
    made = plan([3, 4], world_size=3)
    assert sorted(map(len, made.ranks)) == [0, 0, 1]
    assert made.program == "FB"
    made.validate([3, 4])
    assert "dummies only" in made.table()


def test_stats_by_hand():
    # 40 = 16 + 16 + 8, and 8 of the short ones behind the tail; 10 stands alone.
    made = plan({5: 40, 6: 8, 7: 10}, samples=[7, 6, 5], config=replace(CONFIG, pair_cost=0.0))
    assert made.lengths == {7: 10, 6: 8, 5: 40}
    stats = made.stats()
    assert (stats.tokens, stats.chunks, stats.lower_bound, stats.recomputed_tokens) == (58, 4, 4, 16)
    assert (stats.fill, stats.split_share) == (58 / 64, 40 / 58)
    assert sorted(stats.costs) == [30, 3 * 48 + 16]
    assert stats.straggler == 160 / 95
    assert stats.cost_bound == 160
    assert made.program == "fFFBBFB"
    assert sorted(stats.dummies) == [0, 5]


def test_table_shows_the_plan():
    made = plan({5: 40, 6: 8, 7: 10}, samples=[7, 6, 5], config=replace(CONFIG, pair_cost=0.0))
    assert made.table().splitlines() == [
        "step 3: 3 samples, denominator 7.5",
        "rank chunk        group  tokens   prefix  samples",
        "   0     0      0 (1/3)      16        0  5",
        "   0     1      0 (2/3)      16       16  5",
        "   0     2      0 (3/3)      16       32  5 6",
        "   1     0            -      10        0  7",
        "program fFFBBFB (7 ops; dummies per rank [0, 5])",
        "58 tokens in 4 chunks of 16 (at least 4), 90.6% full; 69.0% of the tokens split, "
        "16 run forward twice (retain 2)",
        "predicted cost per rank [160, 30], slowest 160 (at least 160), 1.684 of the mean",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, "a step of no samples cannot be planned"),
        ({"lengths": [3, 0], "samples": [8, 9]}, "sample 9 has 0 tokens; it needs at least 1: drop it before planning"),
        ({"lengths": {8: 3, 9: -4}, "samples": [8, 9]}, "sample 9 has -4 tokens"),
        (
            {"lengths": [3, 2**31], "samples": [8, 9]},
            "sample 9 has 2147483648 tokens; at most 2147483647 can be counted",
        ),
        ({"lengths": [3, 2.5]}, "lengths must be whole numbers of at most 64 bits"),
        ({"lengths": [3, 2**70]}, "lengths must be whole numbers of at most 64 bits"),
        (
            {"lengths": [3, 50], "config": replace(CONFIG, max_tokens=49)},
            "sample 1 has 50 tokens; max_tokens, .* is 49: raise it, or choose an overflow",
        ),
        ({"lengths": {8: 3}, "samples": [8, 9]}, "sample 9 has no length"),
        ({"lengths": [3], "samples": [8, 9]}, "1 lengths for 2 samples; give one length a sample"),
        ({"lengths": [3, 3], "samples": [8, 8]}, "sample 8 stands 2 times in one step"),
        ({"lengths": [3], "world_size": 0}, "world_size is 0; it must be at least 1"),
        ({"lengths": [3], "denominator": float("nan")}, "denominator of step 3 is nan"),
    ],
)
def test_the_impossible_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        plan(**change)


LENGTHS = {0: 40, 1: 8, 2: 10, 3: 33, 4: 15}


def broken(edit):
    """A plan of LENGTHS on one rank, its chunks edited: 0 0 0+1 | 3 3 3+4 | 2, by their samples."""
    made = plan(LENGTHS, samples=list(LENGTHS), world_size=1)
    chunks = list(made.ranks[0])
    assert [[s.sample for s in c.segments] for c in chunks] == [[0], [0], [0, 1], [3], [3], [3, 4], [2]]
    made.validate(LENGTHS)
    edit(chunks)
    return replace(made, ranks=(tuple(chunks),))


def put(position, *segments, **changes):
    def edit(chunks):
        segment_tuple = tuple(Segment(*numbers) for numbers in segments) or chunks[position].segments
        chunks[position] = replace(chunks[position], segments=segment_tuple, **changes)

    return edit


def swap(chunks):
    chunks[0], chunks[1] = chunks[1], chunks[0]


def overfill(chunks):
    put(2, (0, 32, 8, 0), (1, 0, 8, 8), (2, 0, 10, 16))(chunks)
    chunks.pop()


def join_tails(chunks):
    put(2, (0, 32, 8, 0), (3, 32, 1, 8))(chunks)
    put(5, (4, 0, 15, 0))(chunks)
    put(6, (2, 0, 10, 0))(chunks)
    chunks.append(Chunk((Segment(1, 0, 8, 0),)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda chunks: chunks.pop(), r"tokens 0 to 10 of sample 2 \(10 tokens\) are not planned"),
        (
            lambda chunks: chunks.append(chunks[-1]),
            "tokens 0 to 10 of sample 2 .* are planned twice",
        ),
        (put(1, (0, 16, 15, 0)), "tokens 31 to 32 of sample 0 .* are not planned"),
        (put(6, (2, 0, 11, 0)), "tokens 10 to 11 of sample 2 .* beyond the end"),
        (lambda chunks: chunks.append(Chunk((Segment(77, 0, 1, 0),))), "holds sample 77, which is not of step 3"),
        (lambda chunks: chunks.append(Chunk(())), "chunk 7 of rank 0 has 0 tokens; it must have 1 to 16"),
        (overfill, "chunk 2 of rank 0 has 26 tokens; it must have 1 to 16"),
        (join_tails, "chunk 2 of rank 0 holds 1 of the 33 tokens of sample 3 without its prefix"),
        (put(6, (2, 0, 10, 1)), "chunk 6 of rank 0 has 10 tokens of sample 2 at offset 1; segments need"),
        (put(6, index=1), "chunk 6 of rank 0 is standalone but index 1 of 1; it must be 0 of 1"),
        (
            put(6, group=5),
            "chunk 6 of rank 0 is index 0 of 1 of group 5, .* a sample of more than 16 tokens",
        ),
        (put(0, group=None, index=0, count=1), "holds 16 of the 40 tokens of sample 0 without its prefix"),
        (put(0, index=1), "is index 1 of 3 of group 0, from token 0 of sample 0"),
        (put(0, count=2), "is index 0 of 2 of group 0"),
        (put(3, group=0), "is of group 0 and starts with sample 3, but the group is of sample 0"),
        (swap, "chunk 0 begins group 0 of 3 chunks, but"),
    ],
)
def test_every_broken_rule_is_found(edit, message):
    with pytest.raises(PlanError, match=message):
        broken(edit).validate(LENGTHS)


def test_a_group_over_two_ranks_and_a_program_too_short_are_found():
    made = plan(LENGTHS, samples=list(LENGTHS), world_size=1)
    chunks = made.ranks[0]
    with pytest.raises(PlanError, match="chunk 3 begins group 1 of 3 chunks"):
        replace(made, ranks=(chunks[:5], chunks[5:])).validate(LENGTHS)
    with pytest.raises(PlanError, match="has no place for the last 1 blocks of this rank, from F of chunk 6"):
        replace(made, program=made.program[:-2]).validate(LENGTHS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(format_version=2), "plan of format 2; this version reads format 1"),
        (lambda raw: raw.pop("format_version"), "not a step plan .'format_version'"),
        (lambda raw: raw.pop("program"), "not a step plan .*program"),
        (lambda raw: raw["config"].update(chunk_tokens=0), "chunk_tokens is 0"),
        (lambda raw: raw["config"].update(size=0), "not a step plan .*size"),
        (lambda raw: raw["ranks"][0][0]["segments"][0].pop(), "not a step plan .*offset"),
    ],
)
def test_text_that_is_no_plan_is_refused(edit, message):
    raw = json.loads(plan([40, 3]).to_json())
    edit(raw)
    with pytest.raises(PlanError, match=message):
        StepPlan.from_json(json.dumps(raw))
    with pytest.raises(PlanError, match=r"give the text that StepPlan\.to_json returned"):
        StepPlan.from_json("[1, 2]")


def test_planning_imports_no_torch():
    code = (
        "import sys; from chunkflow.plan import plan_step; from chunkflow.config import PlannerConfig\n"
        "p = plan_step(0, [0, 1], [9, 40], config=PlannerConfig(chunk_tokens=8), world_size=2, denominator=1.0)\n"
        "p.validate([9, 40]); p.table(); print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
