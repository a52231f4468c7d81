"""How long a run still takes, where phases differ in speed."""

from collections.abc import Mapping, Sequence


def seconds_left(ends: Sequence[int], step: int, step_s_by_phase: Mapping[int, float]) -> float:
    """Return the seconds that the steps to come take.

    Args:
        ends: steps done at the end of each phase.
        step: steps done.
        step_s_by_phase: seconds per step of the phases known so far, at least one; a phase that is not known is taken
            to be as fast as the known one nearest to it.
    """
    total, start = 0.0, step
    for phase, end in enumerate(ends):
        nearest = min(step_s_by_phase, key=lambda known: (abs(known - phase), -known))
        total += max(end - start, 0) * step_s_by_phase[nearest]
        start = max(start, end)
    return total
