"""The axes of the world. pp: pipeline stages; dp: data; ep: experts; esp: slices of an expert."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "ep", "esp")


def make_mesh(device_type: str, world_size: int) -> DeviceMesh:
    """Return the mesh of a job: so far, every rank is one of `dp`. Every rank calls, once the world exists."""
    return init_device_mesh(device_type, (1, world_size, 1, 1), mesh_dim_names=AXES)
