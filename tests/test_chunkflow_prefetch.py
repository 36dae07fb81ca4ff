"""One thread, a few items ahead, gone when nobody wants them any more."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from chunkflow.errors import ChunkflowError, StateError
from chunkflow.prefetch import Prefetcher


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


def threads():
    return [t for t in threading.enumerate() if t.name == "chunkflow-prefetch"]


def test_all_items_in_order():
    with Prefetcher(iter(range(100)), depth=3) as ahead:
        assert list(ahead) == list(range(100))
        assert list(ahead) == []
    assert threads() == []


def test_it_works_ahead_and_no_further_than_it_may():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    with Prefetcher(items(), depth=3) as ahead:
        wait_until(lambda: len(made) == 4)  # three waiting, one in hand
        time.sleep(0.3)
        assert len(made) == 4
        next(ahead)
        wait_until(lambda: len(made) == 5)


def test_an_error_comes_in_its_turn_with_its_traceback():
    def items():
        yield 1
        yield 2
        raise OSError("disk on fire")

    with Prefetcher(items(), depth=5) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(OSError, match="disk on fire") as caught:
            next(ahead)
        assert any(entry.name == "items" for entry in caught.traceback)
        with pytest.raises(StopIteration):
            next(ahead)


def test_close_ends_the_thread_and_the_iteration():
    ahead = Prefetcher(iter(range(10**9)), depth=2)
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert threads() == []
    with pytest.raises(StateError, match=r"this iteration was ended by close\(\)"):
        next(ahead)


def test_dropping_it_ends_the_thread():
    ahead = Prefetcher(iter(range(10**9)), depth=2)
    assert next(ahead) == 0
    assert len(threads()) == 1
    del ahead
    gc.collect()
    wait_until(lambda: threads() == [])


def test_the_process_ends_while_it_runs():
    program = """
from chunkflow.prefetch import Prefetcher
import itertools
ahead = Prefetcher(itertools.count(), depth=2)
print(next(ahead))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_batch_that_never_comes_is_an_error(monkeypatch):
    monkeypatch.setattr("chunkflow.prefetch._MOST_WAIT_S", 0.3)
    release = threading.Event()

    def stuck():
        release.wait(timeout=20)
        yield 1

    with Prefetcher(stuck(), depth=1) as ahead:
        try:
            with pytest.raises(ChunkflowError, match=r"no batch was ready within 0\.3 s; is storage stuck\?"):
                next(ahead)
        finally:
            release.set()
