"""Models from folders: loaded whole, or refused."""

import json

import pytest
import torch

from launch.config import ModelConfig
from launch.errors import ModelError
from launch.model import build_model
from tests.tiny import tiny_model


def build(folder):
    return build_model(ModelConfig(path=str(folder)), None, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_exported_is_what_was_loaded(folder, tmp_path):
    build(folder).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("length", [0, 5000])
def test_damaged_weights_are_refused(folder, length):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"model.path .* is no model that transformers can load"):
        build(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_hidden_layers": 3}, r"lacks 9 weights of LlamaForCausalLM, as model.layers.2.*they would be random"),
        ({"intermediate_size": 64}, r"is no model that transformers can load"),
    ],
)
def test_weights_of_another_model_are_refused(folder, change, text):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=text):
        build(folder)
