"""The axes of the world. pp: pipeline stages; dp: data; ep: experts; esp: slices of an expert."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from launch.errors import ConfigError

AXES = ("pp", "dp", "ep", "esp")


def make_mesh(device_type: str, world_size: int, *, pp: int = 1) -> DeviceMesh:
    """Return the mesh of a job: `pp` ranks are a pipeline, and there are as many of those as `dp`. Every rank calls.

    Raises ConfigError when the world is no multiple of a pipeline.
    """
    if world_size % pp:
        raise ConfigError(
            f"{world_size} processes do not make pipelines of pipeline.ranks = {pp}; start a multiple of {pp}"
        )
    return init_device_mesh(device_type, (pp, world_size // pp, 1, 1), mesh_dim_names=AXES)
