"""Checkpoints of every released format version load for ever: folders in tests/data, written once."""

from pathlib import Path
from typing import Any

import torch

from checkpointing import SINGLE, Checkpointer
from checkpointing.folder import Folder
from checkpointing.manifest import FORMAT_VERSION, loads
from checkpointing.storage.local import LocalStorage
from checkpointing.verify import damages
from tests.flat_states import Flat, same

GOLDEN = Path(__file__).parent / "data"


def golden_state(step: int) -> dict[str, Any]:
    """What is in tests/data/checkpoint-v2, written by two ranks; spelled out, so that no generator can change it.

    `cut` was held in slices, by rows; `rank.0` and `rank.1` by one rank each; `frozen` is in step 13 a reference to the
    file of step 11.
    """
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4) + step
    return {
        "w": shared,
        "tied": shared,
        "cut": torch.arange(35, dtype=torch.float64).reshape(7, 5) * step,
        "bf16": torch.arange(5).to(torch.bfloat16) / 4,
        "scalar": torch.tensor(step, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "frozen": torch.arange(17_000, dtype=torch.float32),
        "rank.0": torch.full((3,), 100 + step),
        "rank.1": torch.full((3,), 200 + step),
        "words": {"text": "é", "pair": (1, 2), "bytes": b"\0\xff", "big": 2**80, 3: [None, True]},
        "value": {"list": [1, 2.5, None, True, "x"], "$key": float("inf")},
    }


def test_every_format_version_has_a_folder():
    versions = sorted(path.name for path in GOLDEN.glob("checkpoint-v*"))
    assert versions == [f"checkpoint-v{version}" for version in range(1, FORMAT_VERSION + 1)]


def test_format_2_loads_for_ever():
    root = GOLDEN / "checkpoint-v2"
    with Checkpointer(root, group=SINGLE) as ckpt:
        assert ckpt.steps() == [12, 13]
        for step in (12, 13):
            back = Flat({})
            assert ckpt.restore(back, step=step).step == step
            assert same(back.loaded, golden_state(step))
    folder = Folder(root, LocalStorage())
    for step in (12, 13):
        manifest = folder.inspect(step)
        for file in manifest.files:
            assert list(damages(folder.storage, folder.at(step), manifest, file, lambda _: None)) == []


def test_format_2_has_all_that_format_2_can_hold():
    manifest = loads((GOLDEN / "checkpoint-v2" / "step-13" / "manifest.json").read_bytes())
    assert manifest.world_size == 2
    assert sum(entry.name == "cut" for entry in manifest.tensors) == 2
    assert any(".from-11." in file.path for file in manifest.files)
    assert manifest.aliases in ({"tied": "w"}, {"w": "tied"})
    assert manifest.objects == {"words": "msgpack"}
    assert manifest.values.keys() == {"value"}
