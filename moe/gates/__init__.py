"""Gates: which experts a token goes to, and with what weight. A gate is a module `gate(x[..., D]) -> Routing`."""

from moe.gates.topk import DeepSeekV3Gate, GShardGate, SigmoidGate, SoftmaxGate, XMoEGate
from moe.gates.whole import ExpertChoiceGate, SoftGate

__all__ = [
    "DeepSeekV3Gate",
    "ExpertChoiceGate",
    "GShardGate",
    "SigmoidGate",
    "SoftGate",
    "SoftmaxGate",
    "XMoEGate",
]
