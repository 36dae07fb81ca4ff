"""Peak memory, each in a fresh process: a long sequence costs its keys, values and their gradients, and no more."""

import json
import mmap
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from benchmarks.chunk_memory_case import Case, key_value_bytes
from chunkflow.memory import peak_resident_bytes, reset_peak, resident_bytes

BASE = Case(mode="chunks", num_tokens=0, chunk_tokens=256, hidden=128)


def peak_bytes(case):
    command = [sys.executable, "-m", "benchmarks.chunk_memory_case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


@pytest.fixture(scope="module")
def one_chunk_bytes():
    return peak_bytes(replace(BASE, num_tokens=BASE.chunk_tokens))


def test_sixteen_chunks_cost_one_chunk_and_the_state(one_chunk_bytes):
    case = replace(BASE, num_tokens=16 * BASE.chunk_tokens)
    assert peak_bytes(case) <= 1.15 * (one_chunk_bytes + key_value_bytes(case, case.num_tokens))


def test_retained_chunks_cost_their_activations(one_chunk_bytes):
    """The measurement sees activations: keeping eight chunks costs several more."""
    case = replace(BASE, num_tokens=16 * BASE.chunk_tokens, retain=8)
    assert peak_bytes(case) > 3 * one_chunk_bytes + key_value_bytes(case, case.num_tokens)


def test_the_peak_is_seen_and_reset():
    before = resident_bytes()
    # Pages of its own: what the heap keeps from earlier tests would hide it.
    with mmap.mmap(-1, 64 * 2**20) as block:
        block.write(b"x" * len(block))
    assert peak_resident_bytes() >= before + 60 * 2**20
    reset_peak()
    assert peak_resident_bytes() < before + 40 * 2**20
