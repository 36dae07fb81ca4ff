"""What can go wrong in chunkflow, as one tree.

ChunkflowError
├── PlanError                a plan breaks one of its own rules, or was asked for the impossible
├── SourceError              the data cannot be used: names the file, the line or the sample
│   └── NoTokenizerError     it needs a tokenizer, or a chat template, that was not given
├── StateError               a loader's saved state belongs to other data or another configuration
└── UnsupportedModelError    the model cannot be trained in chunks exactly: names the layer and the reason
"""


class ChunkflowError(Exception):
    """Base of everything chunkflow raises on purpose."""


class PlanError(ChunkflowError):
    """A plan breaks one of its own rules, or was asked for the impossible."""


class SourceError(ChunkflowError):
    """The data cannot be used; the message names the file, the line or the sample."""


class NoTokenizerError(SourceError):
    """The data needs a tokenizer, or a chat template, that was not given."""


class StateError(ChunkflowError):
    """A loader's saved state belongs to other data or another configuration; the message names the difference."""


class UnsupportedModelError(ChunkflowError):
    """The model cannot be trained in chunks with exact gradients; the message names the layer and the reason."""
