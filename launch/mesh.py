"""The axes of the world. pp: pipeline stages; dp: data; ep: experts; esp: slices of an expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from launch.errors import ConfigError

AXES = ("pp", "dp", "ep", "esp")


def make_mesh(device_type: str, world_size: int, *, pp: int = 1, ep: int = 1, esp: int = 1) -> DeviceMesh:
    """Return the mesh of a job. Every rank calls.

    `pp` ranks are a pipeline, `ep * esp` ranks hold every expert once, and there are as many of those as `dp`. Raises
    ConfigError when the world is no multiple of them.
    """
    if world_size % pp:
        raise ConfigError(
            f"{world_size} processes do not make pipelines of pipeline.ranks = {pp}; start a multiple of {pp}"
        )
    if world_size % (pp * ep * esp):
        raise ConfigError(
            f"{world_size} processes do not divide into groups of moe.ep = {ep} times moe.esp = {esp}; start a "
            f"multiple of {pp * ep * esp}"
        )
    return init_device_mesh(device_type, (pp, world_size // (pp * ep * esp), ep, esp), mesh_dim_names=AXES)


def limit_waits(mesh: DeviceMesh, timeout_s: float) -> None:
    """Let no collective of the world or of an axis take longer; gloo would wait half an hour. Every rank calls."""
    for group in (dist.group.WORLD, *mesh.get_all_groups()):
        _set_pg_timeout(timedelta(seconds=timeout_s), group)  # torch has no public name for it


@contextmanager
def met_within(timeout_s: float) -> Iterator[None]:
    """Let the ranks of a group that is made inside the block, by whomever, wait no longer for each other.

    Under gloo, which would wait half an hour; NCCL's ranks meet in their first collective.
    """
    usual = distributed_c10d.default_pg_timeout  # torch has no other way into what a library makes
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    try:
        yield
    finally:
        distributed_c10d.default_pg_timeout = usual


@contextmanager
def limited_groups(timeout_s: float) -> Iterator[None]:
    """Do for every group that is made inside the block, by a library, what `limit_waits` does for ours."""
    before = set(_world.pg_map)
    with met_within(timeout_s):
        yield
    for group in set(_world.pg_map) - before:
        _set_pg_timeout(timedelta(seconds=timeout_s), group)
