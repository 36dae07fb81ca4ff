"""Mixture-of-experts layers whose communication is co-scheduled with the experts (FSMoE, arXiv 2501.10714).

model = moe.parallelize(model, mesh, ep="ep", dp="dp", plan=plan)     # transformers models, in place
model = moe.upcycle(dense_model, num_experts=8)                       # an MoE from a dense model
for finding in moe.doctor(model): print(finding)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe import sliced, state, sync, tracing
    from moe.audit import audit_aux_loss, audit_gradients
    from moe.config import MoeConfig
    from moe.convert.hf import save_pretrained
    from moe.convert.upcycle import upcycle
    from moe.examine import doctor
    from moe.layer import MoELayer
    from moe.parallel import expert_layers, parallelize
    from moe.plan import LayerPlan

# Loaded when asked for, so that commands which need no model start without torch and transformers. No file has the name
# of one of these: importing it would put the module where the function belongs.
_WHERE = {
    "LayerPlan": "moe.plan",
    "MoELayer": "moe.layer",
    "MoeConfig": "moe.config",
    "audit_aux_loss": "moe.audit",
    "audit_gradients": "moe.audit",
    "doctor": "moe.examine",
    "expert_layers": "moe.parallel",
    "parallelize": "moe.parallel",
    "save_pretrained": "moe.convert.hf",
    "upcycle": "moe.convert.upcycle",
}

_MODULES = ("sliced", "state", "sync", "tracing")
"""Parts that are used by their own name: `moe.sliced.attach_reducer(model)`."""

__all__ = [
    "LayerPlan",
    "MoELayer",
    "MoeConfig",
    "audit_aux_loss",
    "audit_gradients",
    "doctor",
    "expert_layers",
    "parallelize",
    "save_pretrained",
    "sliced",
    "state",
    "sync",
    "tracing",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"moe.{name}")
    raise AttributeError(f"module 'moe' has no attribute {name!r}")
