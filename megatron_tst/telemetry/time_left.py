"""Estimates the remaining time of a run whose phases differ in speed."""

from collections.abc import Mapping, Sequence


def seconds_left(ends: Sequence[int], step: int, step_s_by_phase: Mapping[int, float]) -> float:
    """Return the estimated seconds of the remaining steps.

    Args:
        ends: number of completed steps at the end of each phase.
        step: number of completed steps.
        step_s_by_phase: seconds per step of at least one phase; a phase without an entry is assumed to be as fast as
            the nearest phase with one.
    """
    total, start = 0.0, step
    for phase, end in enumerate(ends):
        nearest = min(step_s_by_phase, key=lambda known: (abs(known - phase), -known))
        total += max(end - start, 0) * step_s_by_phase[nearest]
        start = max(start, end)
    return total
