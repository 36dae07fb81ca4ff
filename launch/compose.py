"""What composes with what, as data: settings are refused from this table at start, and the documents print it.

    python -m launch.compose_table        the table in Markdown

A feature is switched on by settings. Two of them are tested together, or refused with a reason before anything is
written; engines and schedules exclude each other, as one setting chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, Literal

from launch.errors import ConfigError

if TYPE_CHECKING:
    from launch.config import FinetuneConfig

EngineName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
LibraryName = Literal["transformers", "megatron"]

WHOLE_SAMPLES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zbv")
"""Schedules of the pipeline that know no dependent chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """Something a job can have."""

    label: str
    settings: Mapping[str, Any]
    """Dotted settings that switch it on, for one."""
    on: Callable[[FinetuneConfig], bool]
    choice: str | None = None
    """Features of one choice exclude each other."""


def _engine(name: EngineName, label: str) -> Feature:
    return Feature(
        label=label,
        settings={"engine": name},
        on=lambda c: c.engine == name,
        choice="engine",
    )


FEATURES: dict[str, Feature] = {
    # Whether a sample is longer than a chunk shows only in the data: `pipeline_job.check_whole_samples`.
    "split": Feature(label="samples split into chunks", settings={}, on=lambda c: False),
    "ddp": _engine("ddp", "engine ddp"),
    "fsdp2": _engine("fsdp2", "engine fsdp2"),
    "zero1": _engine("zero1", "engine zero1"),
    "zero2": _engine("zero2", "engine zero2"),
    "zero3": _engine("zero3", "engine zero3"),
    "state_aware": Feature(
        label="pipeline, state_aware_1f1b",
        settings={"pipeline.ranks": 2},
        on=lambda c: c.pipeline.ranks > 1 and c.pipeline.schedule == "state_aware_1f1b",
        choice="schedule",
    ),
    "whole": Feature(
        label="pipeline, the other schedules",
        settings={"pipeline.ranks": 2, "pipeline.schedule": "1f1b"},
        on=lambda c: c.pipeline.ranks > 1 and c.pipeline.schedule in WHOLE_SAMPLES,
        choice="schedule",
    ),
    "roundpipe": Feature(
        label="pipeline, roundpipe",
        settings={"pipeline.schedule": "roundpipe"},
        on=lambda c: c.pipeline.schedule == "roundpipe",
        choice="schedule",
    ),
    "experts": Feature(label="expert parallel", settings={"moe.ep": 2}, on=lambda c: c.moe.wanted),
    "bf16": Feature(
        label="bf16", settings={"model.precision": "bf16"}, on=lambda c: c.model.precision == "bf16"
    ),
    "lora": Feature(label="LoRA", settings={"lora.rank": 4}, on=lambda c: c.lora.rank is not None),
    "megatron": Feature(
        label="Megatron-core model",
        settings={"model.library": "megatron"},
        on=lambda c: c.model.library == "megatron",
    ),
    "checkpoints": Feature(label="lazy checkpoints", settings={}, on=lambda c: True),
    "tensor": Feature(
        label="tensor parallel", settings={"tensor_parallel": 2}, on=lambda c: c.tensor_parallel > 1
    ),
    "context": Feature(
        label="context parallel", settings={"context_parallel": 2}, on=lambda c: c.context_parallel > 1
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Two features together: the test that shows it, or why not."""

    test: str | None = None
    """`file::function` below tests/."""
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.test is None) == (self.reason is None):
            raise ValueError("a cell has a test or a reason")


def _tested(test: str) -> Cell:
    return Cell(test=test)


def _refused(reason: str) -> Cell:
    return Cell(reason=reason)


ANY = frozenset(FEATURES)
SHARDING = frozenset({"fsdp2", "zero1", "zero2", "zero3"})
ZERO = frozenset({"zero1", "zero2", "zero3"})
ENGINES = frozenset({"ddp", *SHARDING})
BOUND = frozenset({"state_aware", "whole"})
PIPES = frozenset({*BOUND, "roundpipe"})

RULES: tuple[tuple[frozenset[str], frozenset[str], Cell], ...] = (
    (frozenset({"tensor"}), ANY, _refused(
        "tensor_parallel is more than 1, and chunk attention and the tiled loss run whole matrices on every rank; "
        "shard weights by engine fsdp2 or zero3, or layers by pipeline.ranks")),
    (frozenset({"context"}), ANY, _refused(
        "context_parallel is more than 1, and the chunks of a sequence are trained one after another on one rank, "
        "which is what bounds memory here; leave it out")),
    (SHARDING, PIPES, _refused(
        "the ranks of a pipeline keep and step their own layers, so an engine that shards the model again has nothing "
        "to hold on to; use engine ddp with a pipeline")),
    (SHARDING, frozenset({"experts"}), _refused(
        "experts are spread over ranks already, and these engines would shard and average them again; use engine ddp "
        "with moe")),
    (frozenset({"experts"}), PIPES, _refused(
        "layers whose experts are spread need all ranks of ep to run the same forwards and backwards in the same "
        "order, and each pipeline orders its own by its own chunks; set pipeline.ranks to 1 without a schedule, or "
        "leave moe out and keep every stage's experts whole")),
    (frozenset({"bf16"}), PIPES, _refused(
        "model.precision is bf16, and pipelines and RoundPipe compute in fp32; set it to fp32")),
    (frozenset({"lora"}), frozenset({"experts"}), _refused(
        "adapters cannot stand beside expert-parallel layers; leave lora or moe out")),
    (frozenset({"megatron"}), frozenset({*SHARDING, *PIPES, "experts", "lora"}), _refused(
        "a GPTModel of Megatron-core is trained whole on every rank; use engine ddp, without pipeline, moe and lora")),
    (frozenset({"megatron"}), frozenset({"bf16"}), _refused(
        "Megatron-core's matrix products run in the dtype of its weights, which stay fp32; set model.precision to "
        "fp32")),
    (frozenset({"split"}), frozenset({"whole", "roundpipe"}), _refused(
        "needs every sample within one chunk; use state_aware_1f1b, larger chunks, or leave longer samples out")),
    (frozenset({"megatron"}), ANY, _tested("test_launch_megatron.py::test_a_gpt_model_trains_resumes_and_is_exported")),
    (frozenset({"bf16"}), frozenset({"experts"}), _tested(
        "test_launch_moe_bf16.py::test_bf16_is_as_near_the_exact_gradient_as_one_process_in_bf16")),
    (frozenset({"experts"}), ANY, _tested(
        "test_launch_moe.py::test_any_spread_trains_as_one_process_and_resumes_another")),
    (frozenset({"bf16"}), frozenset({"fsdp2"}), _tested("test_launch_fsdp2.py::test_bf16_in_shards_stays_near")),
    (frozenset({"lora"}), frozenset({"fsdp2"}), _tested("test_launch_fsdp2.py::test_adapters_in_shards")),
    (frozenset({"fsdp2"}), ANY, _tested("test_launch_fsdp2.py::test_shards_train_as_one_process_and_resume_another")),
    (ZERO, frozenset({"bf16", "lora"}), _tested("test_launch_zero.py::test_four_ranks_adapters_and_bf16")),
    (ZERO, ANY, _tested("test_launch_zero.py::test_another_world_and_another_engine_go_on")),
    (frozenset({"bf16"}), ANY, _tested("test_launch_compose.py::test_bf16_stays_near_one_process_in_fp32")),
    (frozenset({"ddp"}), PIPES, _tested("test_launch_compose.py::test_several_pipelines_share_the_data")),
    (ANY, ANY, _tested("test_launch_compose.py::test_together_they_train_as_one_process")),
)  # fmt: skip
"""The first that has both features, in either order, counts."""


def cell(one: str, other: str) -> Cell | None:
    """Return what is known of two features; None where they exclude each other, or are one that stands alone."""
    a, b = FEATURES[one], FEATURES[other]
    for left, right, found in RULES:
        if (one in left and other in right) or (other in left and one in right):
            if one == other and found.reason is None:
                return None
            return None if one != other and a.choice is not None and a.choice == b.choice else found
    raise KeyError((one, other))


def active(config: FinetuneConfig) -> list[str]:
    """Return the features that settings switch on."""
    return [name for name, feature in FEATURES.items() if feature.on(config)]


def require_composable(config: FinetuneConfig) -> None:
    """Raise ConfigError, naming the two features and the reason, for settings that do not go together. Pure."""
    for one, other in combinations_with_replacement(active(config), 2):
        found = cell(one, other)
        if found is not None and found.reason is not None:
            names = " and ".join(dict.fromkeys((FEATURES[one].label, FEATURES[other].label)))
            raise ConfigError(f"{names}: {found.reason}")
