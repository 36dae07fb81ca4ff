"""Checks of weights: which version an action uses, and what is uploaded, downloaded, updated and freed."""

from __future__ import annotations

from pipeline.actions import COMPUTE, Op
from pipeline.errors import ScheduleError
from pipeline.listing import Listing


def check_versions(found: Listing) -> None:
    """One version in all compute of a (layer, micro-batch), at most `staleness` behind its step."""
    schedule = found.schedule
    first: dict[tuple[int, int], int] = {}
    for i, action in enumerate(found.actions):
        if action.op not in COMPUTE or action.microbatch is None:
            continue
        version, step = schedule.version(action), schedule.step(action.microbatch)
        if not step - schedule.staleness <= version <= step:
            raise found.fail(
                i, f"uses weights of version {version} in step {step}; its staleness is declared {schedule.staleness}"
            )
        for layer in range(*schedule.layers(action)):
            other = found.actions[first.setdefault((layer, action.microbatch), i)]
            if schedule.version(other) != version:
                raise found.fail(
                    i,
                    f"uses version {version} of layer {layer}, and {other.label} on device {other.device} used "
                    f"{schedule.version(other)}; forward and backward need the same",
                )


def check_streams(found: Listing) -> None:
    """On devices with uploads: the right weights, there when used, freed once; no gradient lost."""
    for device in sorted(found.streamed):
        there: dict[int, list[int]] = {}
        gradients: dict[int, int] = {}
        for i, action in enumerate(found.actions):
            if found.where[i][0] != device:
                continue
            if action.op is Op.UPLOAD:
                there.setdefault(action.stage, []).append(i)
            elif action.op in COMPUTE:
                _check_use(found, i, there.get(action.stage, []))
                if action.op in (Op.B, Op.W, Op.FB):
                    gradients[action.stage] = i
            elif action.op is Op.DOWNLOAD and gradients.pop(action.stage, None) is None:
                raise found.fail(
                    i, "there is no gradient of its stage on the device; download once, after the backward"
                )
            elif action.op is Op.FREE and action.microbatch is None:
                if action.stage in gradients:
                    raise found.fail(gradients[action.stage], "its weight gradient is never downloaded before the FREE")
                if not there.get(action.stage):
                    raise found.fail(i, "the weights of its stage are not on the device")
                there[action.stage].pop(0)
        _check_left(found, there, gradients)


def _check_use(found: Listing, i: int, uploads: list[int]) -> None:
    schedule, action = found.schedule, found.actions[i]
    fits = [
        j
        for j in uploads
        if schedule.layers(found.actions[j]) == schedule.layers(action)
        and schedule.version(found.actions[j]) == schedule.version(action)
    ]
    if not fits:
        have = ", ".join(str(found.actions[j]) for j in uploads) or "none"
        raise found.fail(
            i,
            f"needs version {schedule.version(action)} of layers {schedule.layers(action)} on the device; uploaded and "
            f"not yet freed there: {have}",
        )


def _check_left(found: Listing, there: dict[int, list[int]], gradients: dict[int, int]) -> None:
    for i in gradients.values():
        raise found.fail(i, "its weight gradient is never downloaded")
    for i in (j for uploads in there.values() for j in uploads):
        raise found.fail(i, "its weights are never freed")


def check_updates(found: Listing) -> None:
    """Where a schedule steps the optimizer, each trained layer is stepped once for every step."""
    schedule = found.schedule
    updates: dict[tuple[int, int], int] = {}
    for i, action in enumerate(found.actions):
        if action.op is not Op.OPT:
            continue
        if action.version is None or not 1 <= action.version <= schedule.steps:
            raise found.fail(i, f"makes version {action.version}; there are versions 1 to {schedule.steps} to make")
        for layer in range(*schedule.layers(action)):
            if updates.setdefault((layer, action.version), i) != i:
                raise found.fail(i, f"makes version {action.version} of layer {layer} a second time")
    trained = [
        (la, v) for la in range(schedule.first_trainable, schedule.num_layers) for v in range(1, schedule.steps + 1)
    ]
    missing = [pair for pair in trained if pair not in updates]
    if updates and missing:
        layer, version = missing[0]
        raise ScheduleError(
            f"{schedule.name}: no OPT makes version {version} of layer {layer}; add one, or leave all of them to the "
            f"caller\n{schedule.table()}"
        )
