"""The manifest's reader takes what the writer writes, and nothing else."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.errors import IntegrityError
from checkpointing.manifest import dumps, loads, loads_summary
from checkpointing.pieces import num_pieces, piece_ranges
from checkpointing.records import FileEntry, Manifest, TensorEntry
from tests.flat_states import same
from tests.test_checkpointing_values import values

HASH = "0123456789abcdef"
FILE = FileEntry("rank-00000.safetensors", 4096 + 24, 4096, HASH)
TENSOR = TensorEntry("w", "F32", (2, 3), (0, 0), (2, 3), FILE.path, 4096, 4120, (HASH,))
OBJECT = TensorEntry("o", "U8", (0,), (0,), (0,), FILE.path, 4120, 4120, ())
RUN = "0123456789abcdef" * 2
MANIFEST = Manifest(RUN, 20, 1, 4096, (FILE,), (TENSOR, OBJECT), {"v": "w"}, {"o": "msgpack"}, {"seed": 3})


def sealed(body: dict) -> bytes:
    """Give a body a right hash, so that only the field under test is wrong."""
    return sealed_text(json.dumps(body))


def sealed_text(text: str) -> bytes:
    rest = text.encode()[1:]
    return b'{"xxh3_64":"' + xxhash.xxh3_64_hexdigest(rest).encode() + b'",' + rest


def as_written(body: dict) -> bytes:
    """As `sealed`, in the writer's own form, which is read in another way."""
    return sealed_text(json.dumps(body, separators=(",", ":")))


def body_of(manifest: Manifest = MANIFEST) -> dict:
    body = json.loads(dumps(manifest))
    del body["xxh3_64"]
    return body


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(names, st.lists(st.integers(0, 9), max_size=4), values, st.integers(0, 2**62))
def test_round_trip(name, shape, value, step):
    size = 2
    for dim in shape:
        size *= dim
    tensor = TensorEntry(name, "BF16", tuple(shape), (0,) * len(shape), tuple(shape), FILE.path, 8, 8 + size, (HASH,))
    tensor = tensor._replace(hashes=(HASH,) * num_pieces(8, 8 + size, 4096))
    file = replace(FILE, length=8 + size, head_bytes=8)
    given_ = Manifest(RUN, step, 3, 4096, (file,), (tensor,), {}, {}, {f"{name}!": value})
    back = loads(dumps(given_))
    assert same(back.values, given_.values)
    assert replace(back, values={}) == replace(given_, values={})
    assert loads_summary(dumps(given_)).step == step


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([4096, 65536, 2**63]))
def test_pieces_are_the_bytes_and_end_at_multiples(begin, size, piece_bytes):
    found = piece_ranges(begin, begin + size, piece_bytes)
    assert len(found) == num_pieces(begin, begin + size, piece_bytes)
    assert [at for pair in found for at in range(*pair, 4096)][:1] == ([begin] if size else [])
    assert sum(b - a for a, b in found) == size
    assert all(b == c for (_, b), (c, _) in pairwise(found))
    assert all(b % piece_bytes == 0 for _, b in found[:-1])


def test_every_changed_cut_or_added_byte_is_noticed():
    data = dumps(MANIFEST)
    for at in range(len(data)):
        for damaged in (data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], data[:at], data[:at] + b" " + data[at:]):
            for read in (loads, loads_summary):
                with pytest.raises(IntegrityError):
                    read(damaged)
    with pytest.raises(IntegrityError):
        loads(data + b"\n")


def set_in(path, value):
    def change(body):
        *parents, last = path
        for key in parents:
            body = body[key]
        body[last] = value

    return change


CHANGES = [
    (set_in(["format_version"], 3), "format_version 3 and this library reads up to 2; upgrade longrail"),
    (set_in(["format_version"], 0), "format_version is 0"),
    (set_in(["format_version"], True), "format_version is True"),
    (set_in(["extra"], 1), r"fields differ from those of version 2: \['extra'\]"),
    (lambda body: body.pop("values"), r"fields differ from those of version 2: \['values'\]"),
    (set_in(["step"], -1), "step is -1; an integer from 0"),
    (set_in(["step"], 1.0), r"step is 1\.0"),
    (set_in(["step"], 2**63), "step is 9223372036854775808"),
    (set_in(["world_size"], 0), "world_size is 0"),
    (set_in(["run_id"], ""), "run_id is ''; 32 hex digits were expected"),
    (set_in(["run_id"], "/../../x"), "run_id is '/../../x'; 32 hex digits were expected"),
    (set_in(["files"], {}), "files is not a list"),
    (set_in(["files", 0, "path"], "../x.safetensors"), r"file '../x.safetensors' is not a plain name"),
    (set_in(["files", 0, "path"], "/etc/x.safetensors"), "is not a plain name"),
    (set_in(["files", 0, "path"], "a/b.safetensors"), "is not a plain name"),
    (set_in(["files", 0, "path"], "..safetensors"), "is not a plain name"),
    (set_in(["files", 0, "path"], "a\\b.safetensors"), "is not a plain name"),
    (set_in(["files", 0, "path"], "a.safetensors\n"), "is not a plain name"),
    (set_in(["files", 0, "path"], "a\0.safetensors"), "is not a plain name"),
    (set_in(["files", 0, "path"], "data.pt"), r"is not a plain name of a \.safetensors file"),
    (set_in(["files", 0, "path"], "data.pkl"), "is not a plain name"),
    (set_in(["files", 0, "length"], 7), "length of rank-00000.safetensors is 7"),
    (set_in(["files", 0, "length"], 10**30), "an integer from 8"),
    (set_in(["files", 0, "xxh3_64"], "0"), "is not 16 hex digits"),
    (
        set_in(["files", 0, "mode"], 1),
        "an entry of FileEntry has not the fields path, length, head_bytes, xxh3_64, pieces",
    ),
    (lambda body: body["files"].append(body["files"][0]), "a file stands twice"),
    (lambda body: body["tensors"].append(body["tensors"][0]), "a tensor stands twice"),
    (lambda body: body["tensors"].append({**body["tensors"][0], "name": "x"}), "tensors 'w' and 'x' overlap"),
    (set_in(["tensors", 0, "name"], 3), "name is 3"),
    (set_in(["tensors", 0, "dtype"], "Q7"), "'w' has the dtype 'Q7'"),
    (set_in(["tensors", 0, "shape"], [3, 3]), r"'w', F32 \[3, 3\], cannot have 24 bytes"),
    (set_in(["tensors", 0, "global_shape"], [3, 3]), "the slices of tensor 'w' have gaps or overlap"),
    (set_in(["tensors", 0, "offset"], [0, 1]), r"'w' has a slice of \[2, 3\] at \[0, 1\], outside of \[2, 3\]"),
    (set_in(["tensors", 0, "offset"], [0]), "'w' has a slice"),
    (set_in(["files", 0, "head_bytes"], 5000), "has 4120 bytes and a head of 5000"),
    (set_in(["files", 0, "pieces"], "01"), "are not groups of 16 hex digits"),
    (set_in(["files", 0, "pieces"], None), "are not groups of 16 hex digits"),
    (set_in(["files", 0, "pieces"], ""), "has too few hashes for tensor 'w'"),
    (set_in(["files", 0, "pieces"], HASH * 2), "has 32 hex digits of hashes, and needs 16"),
    (set_in(["piece_bytes"], 0), "piece_bytes is 0; an integer from 4096"),
    (set_in(["piece_bytes"], 4097), "piece_bytes is 4097; a multiple of 4096"),
    (set_in(["objects"], {"w": "msgpack"}), "object 'w' is not a whole U8 tensor of one dim"),
    (set_in(["objects"], {"o": "pickle"}), "object 'o' is 'pickle'; upgrade longrail"),
    (set_in(["tensors", 0, "shape"], [-2, -3]), "a dim of tensor 'w' is -2"),
    (set_in(["tensors", 0, "shape"], "23"), "a shape of tensor 'w' is not a list"),
    (set_in(["tensors", 0, "shape"], [1] * 65), "is not a list of at most 64"),
    (set_in(["tensors", 0, "shape"], [0, 2**62, 2**62]), "the shape of tensor 'w' is too large"),
    (set_in(["tensors", 0, "begin"], 4095), r"'w', F32 \[2, 3\], cannot have 25 bytes"),
    (set_in(["tensors", 0, "begin"], 5000), "cannot have -880 bytes"),
    (set_in(["tensors", 0, "end"], 4121), "'w' lies outside of the files"),
    (set_in(["tensors", 0, "file"], "rank-00001.safetensors"), "'w' lies outside of the files"),
    (set_in(["tensors", 0, "xxh3_64"], HASH), "an entry of TensorEntry has not the fields"),
    (set_in(["aliases"], []), "aliases is not an object"),
    (set_in(["aliases"], {"v": "gone"}), "alias 'v' of 'gone' is not a new name of a tensor"),
    (set_in(["aliases"], {"w": "w"}), "alias 'w' of 'w'"),
    (set_in(["aliases"], {"v": ["w"]}), "alias 'v'"),
    (set_in(["values"], {"w": 1}), "value 'w' is empty or has the name of a tensor"),
    (set_in(["values"], {"v": 1}), "value 'v' is empty or has the name"),
    (set_in(["values"], {"x": {"$float": "1"}}), "is not a number"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_sealed_but_wrong_manifests_are_refused(change, text):
    for seal in (sealed, as_written):
        body = body_of()
        assert loads(seal(body)) == MANIFEST
        change(body)
        with pytest.raises(IntegrityError, match=text):
            loads(seal(body))


ROW = json.dumps(body_of()["tensors"][0], separators=(",", ":"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"begin":4096,', '"begin":04096,'),
        ('"begin":4096,', '"begin":4096,"begin":4096,'),
        ('"shape":[2,3]', '"shape":[2,03]'),
        ('"shape":[2,3]', '"shape":[2,3,]'),
        (ROW, ROW + ","),
        (ROW + ",", ROW + ";"),
        (ROW + ",", ROW),
        (ROW, "," + ROW),
        ('"name":"w"', '"name":"w\n"'),
        ('"name":"w"', '"name":"\u00e9"'),
        ('"tensors":[', '"tensors":[],"tensors":['),
        ('"values":{"seed":3}', '"values":{"seed":3},"tensors":[]'),
        ('"values":{"seed":3}', '"values":{"seed":3},"step":20'),
        ('"files":[', '"files":[{"path":"a","tensors":[' + ROW + '],"aliases":{}},'),
        ('"run_id":', '"values":{"x":1,"tensors":[' + ROW + '],"aliases":{}},"run_id":'),
    ],
)
def test_what_is_nearly_in_the_writers_form_is_refused(old, new):
    text = json.dumps(body_of(), separators=(",", ":"))
    assert loads(sealed_text(text)) == MANIFEST
    assert old in text
    with pytest.raises(IntegrityError):
        loads(sealed_text(text.replace(old, new, 1)))


def sliced(*boxes: tuple[list[int], list[int]], whole=(4, 6)) -> bytes:
    """A manifest of one U8 tensor in slices: (offset, shape) each."""
    body, at = body_of(), 4096
    first, body["tensors"] = body["tensors"][0], []
    for offset, shape in boxes:
        end = at + shape[0] * shape[1]
        body["tensors"].append(
            first
            | {"dtype": "U8", "offset": offset, "shape": shape, "global_shape": list(whole), "begin": at, "end": end}
        )
        at = end
    body["files"][0] |= {"length": at, "pieces": HASH * len(boxes)}
    return sealed(body | {"objects": {}})


def test_slices_that_tile_the_whole_are_read():
    for boxes in [
        [([0, 0], [4, 2]), ([0, 2], [4, 4])],
        [([0, 0], [1, 6]), ([1, 0], [3, 3]), ([1, 3], [3, 3])],
    ]:
        found = loads(sliced(*boxes)).tensors
        assert [(list(one.offset), list(one.shape)) for one in found] == boxes
        assert {one.global_shape for one in found} == {(4, 6)}


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([([0, 0], [4, 2])], "have gaps or overlap"),
        ([([0, 0], [4, 4]), ([0, 2], [4, 2])], "have gaps or overlap"),
        ([([0, 0], [2, 6]), ([1, 0], [2, 6])], "have gaps or overlap"),
        ([([0, 0], [4, 3]), ([0, 0], [4, 3])], "stands twice"),
        ([([0, 0], [4, 3]), ([0, 4], [4, 3])], "outside of"),
    ],
)
def test_slices_that_do_not_are_refused(boxes, text):
    with pytest.raises(IntegrityError, match=text):
        loads(sliced(*boxes))


def test_sizes_that_overflow_64_bits_are_refused():
    body = body_of()
    body["tensors"][0] |= {"global_shape": [2**40, 2**40], "shape": [2**40, 2**40], "begin": 8, "end": 8}
    with pytest.raises(IntegrityError, match="the shape of tensor 'w' is too large"):
        loads(sealed(body))


@pytest.mark.parametrize(
    "rest", [b'"a":1,"a":1}', b'"a":NaN}', b"]", b'"a":' + b"[" * 100_000 + b"}", b"\x80\x04.", b""]
)
def test_sealed_bytes_that_are_not_strict_json(rest):
    with pytest.raises(IntegrityError, match="not strict JSON"):
        loads(b'{"xxh3_64":"' + xxhash.xxh3_64_hexdigest(rest).encode() + b'",' + rest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
places = st.sampled_from(
    [[key] for key in body_of()]
    + [["files", 0, key] for key in body_of()["files"][0]]
    + [["tensors", 0, key] for key in body_of()["tensors"][0]]
)


@given(places, json_values)
def test_any_field_holding_anything_is_read_or_refused_and_never_crashes(path, value):
    body = body_of()
    set_in(path, value)(body)
    try:
        found = loads(sealed(body))
    except IntegrityError:
        return
    for tensor in found.tensors:  # what passes keeps every promise the loader relies on
        file = next(file for file in found.files if file.path == tensor.file)
        assert 8 <= tensor.begin <= tensor.end <= file.length
        assert "/" not in file.path


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    with pytest.raises(IntegrityError):
        loads(data)
