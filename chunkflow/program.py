"""Op programs: what a rank does in one optimizer step, over `f` (forward without graph), `F` (forward), `B` (backward).

A program is a row of *blocks*: `f`, or F * depth + B * depth. Ranks that share sharded parameters must issue the same
collectives in the same order, so they run one common program; at a block that a rank has no use for it does dummies of
weight zero. Blocks are never torn: the string `FBFBB` contains both `FFBB` and `FBFB` as subsequences, but a rank that
needs either would be left with a dummy B and no graph to run it on. Their common program is `FFBBFB`.

Source: ChunkFlow, arXiv 2503.02356, with the *last* `retain` chunks of a group kept, and backward descending: dK and dV
of a chunk are complete only when all later chunks are done.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from chunkflow.compiled import kernel
from chunkflow.errors import PlanError
from chunkflow.records import Chunk

Operation = tuple[str, int]
"""An op and the position, among the rank's chunks, of the chunk that it runs."""

BLOCK = re.compile("f|F+B+")
MOST_CELLS = 4_000_000  # of the table of one exact merge: 16 MB and some 10 ms


def operations(chunks: Sequence[Chunk], retain: int) -> Iterator[Operation]:
    """Yield the ops of one rank over its chunks, in order.

    Raises PlanError when the chunks of a group do not stand together in ascending order.
    """
    position = 0
    while position < len(chunks):
        count = chunks[position].count
        _require_whole_group(chunks, position)
        first_kept = position + max(0, count - retain)
        end = position + count
        yield from (("f", n) for n in range(position, first_kept))
        yield from (("F", n) for n in range(first_kept, end))
        yield from (("B", n) for n in reversed(range(first_kept, end)))
        for n in reversed(range(position, first_kept)):
            yield from (("F", n), ("B", n))
        position = end


def job_program(count: int, retain: int) -> str:
    """Return the program of one job of `count` chunks."""
    twice = max(0, count - retain)
    return "f" * twice + block_text(count - twice) + "FB" * twice


def local_program(chunks: Sequence[Chunk], retain: int) -> str:
    """Return the ops of one rank as a program, without dummies."""
    return "".join(op for op, _ in operations(chunks, retain))


def align(program: str, own: Iterable[Operation]) -> list[tuple[str, int | None]]:
    """Return (op, position) for every op of `program`; position None is a dummy. A rank's operations keep their order.

    Every dummy B stands behind a dummy F of its own. Meant to be called before the first op runs: on a misfit one rank
    alone would stop, and the others wait for it.

    Raises PlanError when the program does not contain the operations.
    """
    own = list(own)
    waiting = deque(_own_blocks(own))
    aligned: list[tuple[str, int | None]] = []
    for depth in depths(program):
        mine = waiting.popleft()[1] if waiting and _fits(waiting[0][0], depth) else []
        aligned += _filled(mine, depth)
    if waiting:
        op, position = waiting[0][1][0]
        raise PlanError(
            f"the program {_shortened(program)} has no place for the last {len(waiting)} blocks of this rank, from "
            f"{op} of chunk {position} on; ranks must run the program of the plan they were given, with its retain"
        )
    return aligned


def common_program(programs: Iterable[str]) -> str:
    """Return a program that contains each of these: the shortest one for two, a short one for more."""
    rows = sorted({tuple(depths(program)) for program in programs}, key=lambda row: (-len(row), row))
    common: list[int] = []
    for row in rows:
        if not _contains(common, row):
            common = _merge(common, list(row))
    return "".join(map(block_text, common))


def depths(program: str) -> list[int]:
    """Return the blocks of a program: 0 for `f`, else the depth of F * depth + B * depth.

    Raises PlanError when it is not a row of such blocks.
    """
    found, end = [], 0
    for block in BLOCK.finditer(program):
        forwards, backwards = block[0].count("F"), block[0].count("B")
        if block.start() != end or forwards != backwards:
            break
        found.append(forwards)
        end = block.end()
    if end != len(program):
        raise PlanError(
            f"not an op program at character {end}: {_shortened(program[end:])!r}; it must be a row of f and of blocks "
            f"of as many B as F, such as FB or FFBB"
        )
    return found


def _require_whole_group(chunks: Sequence[Chunk], position: int) -> None:
    first = chunks[position]
    job = chunks[position : position + first.count]
    found = [(chunk.group, chunk.index, chunk.count) for chunk in job]
    if found != [(first.group, index, first.count) for index in range(first.count)]:
        raise PlanError(
            f"chunk {position} begins group {first.group} of {first.count} chunks, but (group, index, count) from it "
            f"on are {found[:8]}; the chunks of a group must stand together, ascending from index 0"
        )


def _own_blocks(own: Sequence[Operation]) -> Iterator[tuple[int, Sequence[Operation]]]:
    end = 0
    for depth in depths("".join(op for op, _ in own)):
        begin, end = end, end + _num_ops(depth)
        yield depth, own[begin:end]


def _filled(own: Sequence[Operation], depth: int) -> list[tuple[str, int | None]]:
    """One block of a program: its own operations (none, or a block that fits), with dummies in the middle.

    So a backward is that of the same forward on every rank, counted from the end: layers that exchange tokens between
    ranks send gradients back the way that the tokens came.
    """
    if depth == 0:
        return list(own) or [("f", None)]
    half = len(own) // 2
    rest = depth - half
    return [*own[:half], *[("F", None)] * rest, *[("B", None)] * rest, *own[half:]]


def block_text(depth: int) -> str:
    """Return the block of this depth; `f` for 0."""
    return "F" * depth + "B" * depth if depth else "f"


def _num_ops(depth: int) -> int:
    return 2 * depth or 1


def _fits(inner: int, outer: int) -> bool:
    return 0 < inner <= outer or inner == outer


def _shortened(program: str) -> str:
    return program if len(program) <= 60 else f"{program[:57]}..."


def _contains(outer: Sequence[int], inner: Sequence[int]) -> bool:
    blocks = iter(outer)
    return all(any(_fits(depth, block) for block in blocks) for depth in inner)


def _merge(a: list[int], b: list[int]) -> list[int]:
    """Return the cheapest row of blocks that contains two rows; of very long rows, piece by piece."""
    if len(a) * len(b) > MOST_CELLS:
        half_a, half_b = len(a) // 2, len(b) // 2
        return _merge(a[:half_a], b[:half_b]) + _merge(a[half_a:], b[half_b:])
    return _merged(np.array(a, dtype=np.int32), np.array(b, dtype=np.int32))[::-1].tolist()


@kernel
def _merged(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the cheapest row, int32 [blocks], backwards."""
    table = _merge_table(a, b)
    merged = np.empty(len(a) + len(b), dtype=np.int32)
    i, j, num = len(a), len(b), 0
    while i > 0 or j > 0:
        if i > 0 and table[i, j] == table[i - 1, j] + max(2 * a[i - 1], 1):
            i -= 1
            merged[num] = a[i]
        elif j > 0 and table[i, j] == table[i, j - 1] + max(2 * b[j - 1], 1):
            j -= 1
            merged[num] = b[j]
        else:
            i, j = i - 1, j - 1
            merged[num] = max(a[i], b[j])
        num += 1
    return merged[:num]


@kernel
def _merge_table(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return int32 [len(a) + 1, len(b) + 1]: ops of the cheapest row that contains a[:i] and b[:j]."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int32)
    for j in range(1, len(b) + 1):
        table[0, j] = table[0, j - 1] + max(2 * b[j - 1], 1)
    for i in range(1, len(a) + 1):
        alone = max(2 * a[i - 1], 1)
        table[i, 0] = table[i - 1, 0] + alone
        for j in range(1, len(b) + 1):
            best = min(table[i - 1, j] + alone, table[i, j - 1] + max(2 * b[j - 1], 1))
            if (a[i - 1] > 0) == (b[j - 1] > 0):
                best = min(best, table[i - 1, j - 1] + max(2 * a[i - 1], 2 * b[j - 1], 1))
            table[i, j] = best
    return table
