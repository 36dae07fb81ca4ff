"""What can go wrong in `moe`.

MoeError
    MoeConfigError     a setting, a model or a group that cannot work
    ContractError      a user-written sub-module breaks its contract
    PlanError          a plan that does not fit the layer, or differs between ranks
    ExchangeError      a rank was lost or late in an exchange; names rank, layer, operation, and whom it waited for
"""


class MoeError(Exception):
    """Base of every error of this package."""


class MoeConfigError(MoeError, ValueError):
    """A setting, a model or a group that cannot work together."""


class ContractError(MoeError):
    """A gate, order, dispatch, combine or expert that breaks its contract."""


class PlanError(MoeError):
    """A plan that does not fit the layer, or that differs between ranks."""


class ExchangeError(MoeError, RuntimeError):
    """A peer was lost or late in the middle of an exchange."""
