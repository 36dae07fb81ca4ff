"""State providers: whoever owns a piece of state exposes it as an ordered stream of byte chunks.

The engine moves bytes and knows nothing of what they are (DataStates-LLM, arXiv 2601.16956). A `state_dict()` may hold
a provider wherever it may hold a tensor; plain tensors are wrapped in a `TensorProvider`.
"""

from checkpointing.providers.base import Cost, Mutability, Place, Provider
from checkpointing.providers.composite import CompositeProvider
from checkpointing.providers.objects import ObjectProvider
from checkpointing.providers.tensors import TensorProvider

__all__ = ["CompositeProvider", "Cost", "Mutability", "ObjectProvider", "Place", "Provider", "TensorProvider"]
