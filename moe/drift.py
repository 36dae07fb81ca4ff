"""When plans and profiles no longer hold: loads or layer times that moved."""

from __future__ import annotations

from collections.abc import Sequence

from moe.cost import LayerLoad

DRIFT = 0.25
"""Relative change of a load after which a plan is made anew."""


def replan_reason(planned: LayerLoad, measured: LayerLoad) -> str | None:
    """Return why a plan made for `planned` no longer fits what was measured, or None."""
    for name in ("exchange_bytes", "gather_bytes", "expert_rows", "gradient_bytes"):
        old, new = getattr(planned, name), getattr(measured, name)
        if abs(new - old) > DRIFT * max(old, 1e-30):
            return f"{name} went from {old:.0f} to {new:.0f}, more than {DRIFT:.0%}"
    return None


def refit_reason(predicted_s: float, measured_s: Sequence[float]) -> str | None:
    """Return why a profile no longer holds: the median of the measured times is over 25% off, or None."""
    middle = sorted(measured_s)[len(measured_s) // 2]
    if abs(middle - predicted_s) <= DRIFT * predicted_s:
        return None
    return f"layers take {middle * 1e3:.2f} ms in the median, {predicted_s * 1e3:.2f} ms were predicted: profile again"
