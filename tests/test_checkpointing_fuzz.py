"""Readers given anything: a manifest with any field changed, cut or moved, and objects of any bytes."""

import copy
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing import SINGLE, Checkpointer, CheckpointError, manifest_tensors
from checkpointing.errors import IntegrityError
from checkpointing.manifest import loads, loads_summary
from checkpointing.objects import dump_object, load_object
from tests.flat_states import Flat
from tests.test_checkpointing_golden import GOLDEN
from tests.test_checkpointing_manifest import as_written, json_values, sealed

REAL = GOLDEN / "checkpoint-v2" / "step-13" / "manifest.json"
EXAMPLES = 400


def body() -> dict[str, Any]:
    found = json.loads(REAL.read_text())
    del found["xxh3_64"]
    return found


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node of a JSON value."""
    below = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(path for key, value in below for path in places(value, (*at, key)))]


PLACES = places(body())[1:]
numbers = st.sampled_from([0, 1, -1, 7, 8, 4095, 4096, 4097, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
anything = json_values | numbers | st.sampled_from(["", "..", "/", "a/../b", "\0", "rank-00000.safetensors", "msgpack"])


def changed(changes: list[tuple[tuple[Any, ...], str, Any, tuple[Any, ...]]]) -> dict[str, Any]:
    """A body after changes of places: set, deleted, doubled, or a copy of another place."""
    found = body()
    for path, how, value, other in changes:
        try:
            target, source = found, found
            for key in path[:-1]:
                target = target[key]
            for key in other:
                source = source[key]
            if how == "set":
                target[path[-1]] = value
            elif how == "delete":
                del target[path[-1]]
            elif how == "double" and isinstance(target, list):
                target.append(copy.deepcopy(target[path[-1]]))
            else:
                target[path[-1]] = copy.deepcopy(source)
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return found


change = st.tuples(
    st.sampled_from(PLACES), st.sampled_from(["set", "delete", "double", "copy"]), anything, st.sampled_from(PLACES)
)


def told(data: bytes) -> str:
    """What a manifest is read as, or why it is refused."""
    try:
        return repr(loads(data))
    except IntegrityError as error:
        return str(error)


@given(st.lists(change, min_size=1, max_size=3))
@settings(max_examples=EXAMPLES)
def test_a_real_manifest_with_anything_changed(changes):
    data = sealed(changed(changes))
    assert told(as_written(changed(changes))) == told(data)
    try:
        found = loads(data)
    except IntegrityError:
        return
    assert loads_summary(data).step == found.step
    lengths = {file.path: file.length for file in found.files}
    for tensor in found.tensors:  # what passes keeps every promise the loader relies on
        assert 8 <= tensor.begin <= tensor.end <= lengths[tensor.file]
    assert all("/" not in path and path.endswith(".safetensors") for path in lengths)


@given(st.integers(0, 10**4), st.integers(0, 10**4), st.binary(max_size=40))
@settings(max_examples=EXAMPLES)
def test_a_real_manifest_with_bytes_replaced(at, length, data):
    good = REAL.read_bytes()
    at %= len(good)
    bad = good[:at] + data + good[at + length % (len(good) - at + 1) :]
    if bad == good:
        return
    for read in (loads, loads_summary):
        with pytest.raises(IntegrityError):
            read(bad)


@given(st.lists(change, min_size=1, max_size=2))
@settings(max_examples=60)
def test_a_restore_of_a_changed_manifest_loads_or_says_why(tmp_path_factory, changes):
    root = tmp_path_factory.mktemp("fuzz")
    place = root / "step-13"
    place.mkdir()
    for file in (GOLDEN / "checkpoint-v2" / "step-13").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "manifest.json").write_bytes(sealed(changed(changes)))
    with Checkpointer(root, group=SINGLE) as ckpt, suppress(CheckpointError):
        ckpt.restore(Flat({}))
    assert {path.name for path in Path(root).rglob("*.safetensors")} == {
        path.name for path in (GOLDEN / "checkpoint-v2" / "step-13").glob("*.safetensors")
    }


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(plain, st.integers(0, 10**4), st.binary(max_size=6))
@settings(max_examples=EXAMPLES)
def test_objects_with_bytes_replaced(value, at, data):
    good = dump_object("o", value)
    at %= len(good) + 1
    for bad in (good[:at] + data + good[at + len(data) :], good[:at], data):
        with suppress(IntegrityError):
            load_object("o", bad)


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 100_000 + b"\xc0",
        msgpack.packb(msgpack.ExtType(1, msgpack.packb(msgpack.ExtType(1, b"\xdd\xff\xff\xff\xff")))),
        msgpack.packb(msgpack.ExtType(2, b"9" * 100_000)),
        msgpack.packb(msgpack.ExtType(99, b"")),
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
)
def test_objects_that_are_meant_to_break_parsers(data):
    with pytest.raises(IntegrityError, match="object 'o'"):
        load_object("o", data)


def cut(shapes: list[tuple[list[int], list[int]]], whole: list[int]) -> bytes:
    found = body()
    file = found["files"][0]
    entry = found["tensors"][0] | {"dtype": "U8", "file": file["path"], "global_shape": whole}
    begin, found["tensors"] = 4096, []
    for offset, shape in shapes:
        size = 1
        for dim in shape:
            size *= dim
        found["tensors"].append(entry | {"offset": offset, "shape": shape, "begin": begin, "end": begin + size})
        begin += size
    found |= {"aliases": {}, "objects": {}, "values": {}, "files": [file]}
    file |= {"length": begin, "pieces": "0123456789abcdef" * len(shapes)}
    return sealed(found)


@pytest.mark.parametrize("column", [False, True])
def test_a_tensor_in_many_slices_is_read_in_good_time(column):
    count = 20_000
    whole = [1, count] if column else [count, 1]
    data = cut([([0, at] if column else [at, 0], [1, 1]) for at in range(count)], whole)
    begin = time.process_time()
    assert len(loads(data).tensors) == count
    assert time.process_time() - begin < 20  # and not hours


def test_slices_that_would_take_hours_to_check_are_refused(monkeypatch):
    monkeypatch.setattr(manifest_tensors, "_MAX_COMPARISONS", 20_000)
    side = 12  # a grid of slices in three dims, no dim of which tells them apart well
    boxes = [([x, y, z], [1, 1, 1]) for x in range(side) for y in range(side) for z in range(side)]
    with pytest.raises(IntegrityError, match="slices, too many to check"):
        loads(cut(boxes, [side] * 3))
