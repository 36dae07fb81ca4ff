"""A reduction with a deadline of its own. The group is of no use after one that timed out: the job has to end."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from pipeline.errors import WatchdogError


def all_reduce(
    tensor: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    timeout_s: float,
    what: str,
) -> None:
    """Reduce a tensor in place over a group, or over all ranks. Every rank of it calls.

    Raises WatchdogError, which begins with `what`, when a rank is gone or does not come within `timeout_s`.
    """
    work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
    try:
        assert work is not None
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
        who = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {others}"
        raise WatchdogError(
            f"{what}: {who} is gone, stopped, hangs, or is later than {timeout_s:g} s: see its output "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
