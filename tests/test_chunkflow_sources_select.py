"""Selections, samples in memory, and sources that do not read what they announced."""

import numpy as np
import pytest

from chunkflow.errors import SourceError
from chunkflow.index import StoredSource
from chunkflow.sources import Sample, fetch
from chunkflow.sources_memory import MemorySource
from tests.source_files import json_lines


def test_a_selection_is_a_source_of_its_own(tmp_path):
    base = json_lines(tmp_path, [{"input_ids": list(range(n))} for n in range(2, 12)])
    some = base.select([7, 0, 3])
    assert some.lengths.tolist() == [9, 2, 5]
    assert some.weights.tolist() == [8, 1, 4]
    assert some.read(2).input_ids.tolist() == list(range(5))
    assert len({base.manifest, some.manifest, base.select([0, 7, 3]).manifest}) == 3
    assert base.select(np.array([7, 0, 3])).manifest == some.manifest
    nested = some.select(range(1, 3))
    assert nested.lengths.tolist() == [2, 5]
    assert nested.manifest != base.select([0, 3]).manifest
    assert fetch(nested, 0).input_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "a selection of 0 samples"),
        ([0, 10], "asks for samples 0 to 10; this source has 0 to 9"),
        ([-1], "asks for samples -1 to -1"),
        ([0.5], "flat list of whole numbers"),
        ([True, False], "flat list of whole numbers"),
    ],
)
def test_bad_selections(tmp_path, indices, message):
    base = json_lines(tmp_path, [{"input_ids": [1, 2]}] * 10)
    with pytest.raises(SourceError, match=message):
        base.select(indices)


def test_reading_outside_is_an_error(tmp_path):
    source = json_lines(tmp_path, [{"input_ids": [1, 2]}] * 10)
    for index in (-1, 10):
        with pytest.raises(IndexError, match="this source has 0 to 9"):
            source.read(index)


class Lying(StoredSource):
    """A source that no longer reads what it announced."""

    sample = Sample(np.array([1, 2]), np.array([2, -100]), np.array([1, 0], dtype=np.float32))

    def read(self, index):
        return self.sample


@pytest.mark.parametrize(
    ("ids", "labels", "weights", "message"),
    [
        ([1, 2, 3], [2, 3, -100], [1, 1, 0], r"sample 0 was announced with 2 tokens and read with .*\(3,\)"),
        ([1, 2], [2, -100], [0.5, 0], r"sample 0 was announced with loss weights of 1\.0 in sum and read with 0\.5"),
        ([1, 2], [2, 3], [1, 0], "sample 0 has a target at its last token"),
        ([1, 2], [-100, -100], [1, 0], "a loss weight where there is no target"),
    ],
)
def test_a_sample_that_is_not_what_was_announced(tmp_path, ids, labels, weights, message):
    source = Lying(json_lines(tmp_path, [{"input_ids": [1, 2]}]).folder)
    fetch(source, 0)
    source.sample = Sample(np.array(ids), np.array(labels), np.array(weights, dtype=np.float32))
    with pytest.raises(SourceError, match=message):
        fetch(source, 0)


def test_bounds_of_samples_in_memory_count_the_targets():
    weights = np.array([1, 0], dtype=np.float32)
    source = MemorySource([Sample(np.array([5, 6]), np.array([label, -100]), weights) for label in (2, 9)])
    assert (source.min_token_id, source.max_token_id) == (2, 9)
