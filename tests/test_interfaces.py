"""What docs/interfaces.md promises between packages, one test an entry."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.stateful import Stateful

import checkpointing
import checkpointing.config
import checkpointing.errors
import chunkflow
import chunkflow.config
import chunkflow.errors
import launch.errors
from benchmarks.claims import Claim
from chunkflow import ChunkLoader, MemorySource, StepBatch
from chunkflow.program import align, depths, operations
from launch.state import TrainState
from tests.spawn import ROOT
from tests.tiny import sequence, tiny_model


def loader(**changes):
    source = MemorySource([sequence(n, length) for n, length in enumerate([5, 70, 9, 30, 12, 8])])
    return ChunkLoader(source, **{"chunk_tokens": 32, "global_batch": 4, **changes})


def fields(kind):
    return [field.name for field in dataclasses.fields(kind)]


def test_groups_one_word_for_one_process():
    assert chunkflow.SINGLE == checkpointing.SINGLE == "single"


def test_every_name_that_checkpointing_speaks_of_can_be_imported():
    """What the facade's help and the pages of docs call by a name of a class."""
    told = inspect.getdoc(checkpointing.Checkpointer) or ""
    told += "".join(inspect.getdoc(one) or "" for _, one in inspect.getmembers(checkpointing.Checkpointer))
    told += "".join((ROOT / "docs" / page).read_text() for page in ("checkpointing.md", "durability.md"))
    kinds = (*vars(checkpointing.errors), *vars(checkpointing.config))
    named = {name for name in kinds if name[0].isupper() and re.search(rf"\b{name}\b", told)}
    assert named >= {"StateError", "IntegrityError", "CheckpointConfig"}
    assert all(hasattr(checkpointing, name) and name in checkpointing.__all__ for name in named - {"Keep"})


def test_a_records():
    assert fields(StepBatch) == ["step", "chunks", "denominator", "program", "samples", "digest"]
    assert fields(chunkflow.Chunk)[:4] == ["segments", "group", "index", "count"]
    assert fields(chunkflow.Segment) == ["sample", "start", "length", "offset"]


def test_a_tensors():
    with loader() as batches:
        for batch in batches:
            for chunk in batch.chunks:
                tensors = chunk.tensors()
                for name in ("input_ids", "position_ids", "shift_labels"):
                    assert tensors[name].dtype == torch.int64
                    assert tensors[name].shape == (1, chunk.num_tokens)
                assert tensors["loss_weights"].dtype == torch.float32
                for name in ("cu_seqlens_q", "cu_seqlens_k"):
                    assert tensors[name].dtype == torch.int32
                    assert tensors[name].shape == (len(chunk.segments) + 1,)
                assert tensors["cu_seqlens_k"][1] - tensors["cu_seqlens_q"][1] == chunk.prefix


def test_a_the_state_advances_when_a_step_is_consumed_not_when_it_is_prefetched():
    with loader(prefetch=2, epochs=3) as batches:
        for batch, _ in zip(batches, range(3), strict=False):
            state = batches.state_dict()
            assert state["epoch"] * batches.steps_per_epoch + state["step"] == batch.step + 1


def test_a_programs_agree_and_serve_every_rank():
    for world_size in (1, 2, 3):
        ranks = [loader(rank=r, world_size=world_size, retain=2) for r in range(world_size)]
        for batches in zip(*ranks, strict=True):
            assert len({b.program for b in batches}) == 1
            assert len({b.denominator for b in batches}) == 1
            depths(batches[0].program)
            for batch in batches:
                own = list(operations(batch.chunks, 2))
                assert [pair for pair in align(batch.program, own) if pair[1] is not None] == own


def test_b_checkpointer():
    kind = checkpointing.Checkpointer
    assert {"path", "keep", "group"} <= set(inspect.signature(kind).parameters)
    assert list(inspect.signature(kind.save).parameters) == ["self", "step", "state"]
    assert list(inspect.signature(kind.restore).parameters) == ["self", "state", "step"]
    for name in ("fence", "close", "__enter__"):
        assert callable(getattr(kind, name))
    for name in ("staged", "wait", "progress"):
        assert hasattr(checkpointing.SaveHandle, name)


def test_b_state_is_flat_and_optimizer_slots_have_parameter_names():
    model = tiny_model(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainState(model, optimizer, loader())
    assert isinstance(state, Stateful)
    flat = state.state_dict()
    for name, value in flat.items():
        assert isinstance(name, str)
        if not isinstance(value, torch.Tensor):
            json.dumps(value, allow_nan=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(flat[f"model.{name}"], parameter)
        assert flat[f"optim.{name}.exp_avg"].shape == parameter.shape


def test_b_loaders_are_stateful():
    assert isinstance(loader(), Stateful)


def test_h_claims():
    assert fields(Claim) == ["name", "value", "unit", "target", "bound", "met", "note"]


@pytest.mark.parametrize("errors", [chunkflow.errors, checkpointing.errors, launch.errors], ids=lambda m: m.__name__)
def test_h_one_exception_base_a_package(errors):
    kinds = [k for k in vars(errors).values() if inspect.isclass(k) and k.__module__ == errors.__name__]
    bases = [k for k in kinds if k.__base__ is Exception]
    assert len(bases) == 1
    assert all(issubclass(kind, bases[0]) for kind in kinds)


@pytest.mark.parametrize("config", [chunkflow.config, checkpointing.config], ids=lambda m: m.__name__)
def test_i_configs_are_frozen_and_by_keyword(config):
    kinds = [k for k in vars(config).values() if dataclasses.is_dataclass(k) and k.__module__ == config.__name__]
    assert kinds
    for kind in kinds:
        assert kind.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(kind))


def test_f_gradient_norm_counts_tied_weights_once():
    from launch.gradnorm import global_grad_norm

    model = tiny_model(tie_word_embeddings=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = global_grad_norm(model.parameters())
    assert float(norm) == pytest.approx(np.sqrt(sum(p.numel() for p in model.parameters())), rel=1e-12)
