"""Interleaved 1F1B (arXiv 2104.04473, section 2.2), for any number of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.actions import Action, Op
from pipeline.schedule import Schedule
from pipeline.schedules.build import Layers, check_counts, even_stages, made


def interleaved(
    *, devices: int, microbatches: int, stages_per_device: int = 2, layers: Layers | None = None
) -> Schedule:
    """Stage s on device s mod devices; micro-batches pass in rounds of about `devices`, depth first.

    Where the number of micro-batches splits into equal rounds this is the order of torch.distributed.pipelining;
    otherwise the first rounds are longer by one.
    """
    check_counts("interleaved", devices, microbatches, stages_per_device)
    rounds = even_stages(microbatches, max(1, microbatches // devices))
    chunks = range(stages_per_device)
    forwards = [(c, m) for r in rounds for c in chunks for m in range(*r)]
    backwards = [(c, m) for r in rounds for c in reversed(chunks) for m in range(*r)]
    first = rounds[0][1]

    def row(d: int) -> Iterator[Action]:
        warmup = min((stages_per_device - 1) * first + 2 * (devices - 1 - d), len(forwards))
        yield from (Action(Op.F, c * devices + d, m) for c, m in forwards[:warmup])
        for i, (c, m) in enumerate(backwards):
            if warmup + i < len(forwards):
                forward_c, forward_m = forwards[warmup + i]
                yield Action(Op.F, forward_c * devices + d, forward_m)
            yield Action(Op.B, c * devices + d, m)

    rows = [row(d) for d in range(devices)]
    return made("interleaved", rows, layers, devices * stages_per_device, microbatches)
