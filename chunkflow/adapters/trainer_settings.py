"""Settings of a Trainer that chunks cannot do: refused, each with what to do instead, or ignored, and said."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import TrainingArguments

from chunkflow.errors import ChunkflowError


def require_possible(args: TrainingArguments) -> None:
    """Raise ChunkflowError, naming it, for a setting under which steps would not be the ones that were asked for."""
    for name, value, is_set, instead in _refused(args):
        if is_set:
            raise ChunkflowError(f"{name} is {value!r}; {instead}")


def ignored(args: TrainingArguments) -> list[str]:
    """Return what is set and has no effect, each with the reason."""
    strategy, workers = args.train_sampling_strategy, args.dataloader_num_workers
    grouped = strategy in ("group_by_length", "batch_rebalance")
    offloads = getattr(args, "activation_offloading", False)  # TRL's
    dispatches = getattr(args.accelerator_config, "dispatch_batches", None)
    averages_means = args.world_size > 1 and not args.average_tokens_across_devices
    full_eval = args.bf16_full_eval or args.fp16_full_eval
    found = {
        f"train_sampling_strategy={strategy!r} (every step is packed and balanced over ranks)": grouped,
        f"dataloader_num_workers={workers} (a thread loads ahead)": workers,
        "dispatch_batches (every rank reads its own chunks)": dispatches,
        "average_tokens_across_devices=False (the loss is the mean over the targets of all ranks)": averages_means,
        "torch_empty_cache_steps (chunks are of one size)": args.torch_empty_cache_steps,
        "activation_offloading (memory is set by chunk_tokens and retain)": offloads,
        "bf16_full_eval, fp16_full_eval (evaluated as it is trained)": full_eval,
    }
    return [text for text, is_set in found.items() if is_set]


def _refused(args: TrainingArguments) -> Iterator[tuple[str, object, bool, str]]:
    """Yield a setting's name, its value, whether it is one that cannot be, and what to do instead."""
    accumulation, strategy = args.gradient_accumulation_steps, args.train_sampling_strategy
    yield (
        "gradient_accumulation_steps", accumulation, accumulation != 1,
        "set it to 1 and multiply per_device_train_batch_size by it: memory is set by chunk_tokens, not by the batch",
    )  # fmt: skip
    yield (
        "train_sampling_strategy", strategy, strategy == "sequential",
        "samples are drawn in an order of ours, by data_seed: set it to 'random', or train them in the order they come "
        "with StreamLoader, in a loop of your own",
    )  # fmt: skip
    yield (
        "auto_find_batch_size", True, args.auto_find_batch_size,
        "set it to False: memory is set by chunk_tokens and retain, not by the batch; lower those",
    )  # fmt: skip
    yield (
        "accelerator_config.split_batches", True, bool(getattr(args.accelerator_config, "split_batches", False)),
        "set it to False: a step has per_device_train_batch_size times the number of ranks samples",
    )  # fmt: skip
    ranks = 1 if args.parallelism_config is None else args.parallelism_config.non_data_parallel_size
    yield (
        "parallelism_config.non_data_parallel_size", ranks, ranks > 1,
        "leave tp_size, cp_size and sp_size at 1: ranks share the samples of a step, and no sample",
    )  # fmt: skip
