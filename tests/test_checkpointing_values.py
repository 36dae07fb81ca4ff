"""JSON values come back exactly, or are refused by name."""

import enum
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.errors import IntegrityError, StateError
from checkpointing.values import canonical, decode, encode
from tests.flat_states import same

texts = st.text(st.characters()).filter(lambda text: json.loads(json.dumps(text)) == text)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("$float"), inner))


@given(values)
def test_round_trip_through_strict_json(value):
    text = json.dumps(encode("x", value), allow_nan=False)
    assert same(decode(json.loads(text)), value)


@given(values, values)
def test_canonical_texts_are_equal_where_values_are(left, right):
    # Dicts in another order are the same value; repr, the comparison of `same`, tells 1 from 1.0 and True.
    assert (canonical(encode("x", left)) == canonical(encode("x", right))) == same(left, right)


class Colour(enum.IntEnum):
    RED = 1


def endless():
    inside = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"state": {0: {}}}, r"'x' at \['state'\] has the key 0 of type int; keys are strings.*launch.TrainState"),
        ({"a": [{"b": torch.ones(1)}]}, r"'x' at \['a'\]\[0\]\['b'\] is of type Tensor; give every tensor a name"),
        ((1, 2), r"'x' is of type tuple; make it a list"),
        ({1, 2}, r"'x' is of type set; make it a sorted list"),
        (b"raw", r"'x' is of type bytes; make it a uint8 tensor"),
        (np.zeros(2), r"'x' is of type numpy.ndarray; make it a tensor"),
        (np.float64(1.0), r"'x' is of type numpy.float64; make it a number of Python's: \.item\(\)"),
        (Colour.RED, r"'x' is of type Colour"),
        (object(), r"'x' is of type object; save tensors and JSON values \(None, bool"),
        (1 << 5000, r"'x' is an int of 5001 bits; save it as a string"),
        (["\ud83d\ude00"], r"'x' at \[0\] holds the surrogate pair '.*', which JSON gives back as one"),
        ({"\ud83d\ude00": 1}, r"'x' holds the surrogate pair"),
        (endless(), r"'x' is nested deeper than 100 levels \(or holds itself\)"),
    ],
)
def test_what_is_not_json_is_refused_by_name(value, text):
    with pytest.raises(StateError, match=text):
        encode("x", value)


def nested(levels):
    return [nested(levels - 1)] if levels else [{"$float": "nan"}]


@pytest.mark.parametrize(
    "encoded",
    [{"$float": "1.0"}, {"$float": ["nan"]}, {"$float": "nan", "a": 1}, {"$new": 1}, nested(100), nested(900)],
)
def test_marks_we_never_write_are_refused(encoded):
    with pytest.raises(IntegrityError):
        decode(encoded)
