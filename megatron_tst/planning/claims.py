"""Whether what is claimed of final losses holds in the runs of a grid, beyond the noise of their seeds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from megatron_tst.planning.sweep_results import SweepResult, differences
from megatron_tst.telemetry.compare import Estimate

# A mean difference speaks where it is as many standard errors from zero. From three seeds on, that leaves a chance of
# one in twenty at most for a difference in the claimed direction where there is none (Student's t, one-sided).
LIMIT = 3.0
HELD, NOT_HELD, NOISE, NOT_RUN = "held", "not held", "within noise", "not run"

# Runs by setting, as their directories are named without the seed, and by seed.
Runs = Mapping[str, Mapping[int, SweepResult]]


def by_setting(results: Sequence[SweepResult]) -> dict[str, dict[int, SweepResult]]:
    """Sort runs of one length by the names of their settings, and by seed."""
    found: dict[str, dict[int, SweepResult]] = {}
    for result in results:
        setting = re.sub(r"(-\d+steps)?-seed\d+$", "", result.name)
        found.setdefault(setting, {})[result.curve.seed] = result
    return found


@dataclass(frozen=True)
class Finding:
    """What runs say of a claim.

    Attributes:
        verdict: held, not held, within noise or not run.
        evidence: the differences behind it, in words.
    """

    verdict: str
    evidence: str


class Claim(Protocol):
    """A claim about settings, which are named as their run directories are, without the seed."""

    text: str

    def judge(self, runs: Runs) -> Finding:
        """Return what the runs that have ended say of it."""


@dataclass(frozen=True)
class Below:
    """One setting ends below another.

    Attributes:
        text: the claim in words.
        lower: the setting that is to end below.
        higher: the other.
    """

    text: str
    lower: str
    higher: str

    def judge(self, runs: Runs) -> Finding:
        """Return what the runs that have ended say of it."""
        gap = _gap(runs, self.lower, self.higher)
        return Finding(_sign(gap), _tell(gap, self.lower, self.higher))


@dataclass(frozen=True)
class Same:
    """Two settings end alike.

    Attributes:
        text: the claim in words.
        one: a setting.
        other: another.
    """

    text: str
    one: str
    other: str

    def judge(self, runs: Runs) -> Finding:
        """Return what the runs that have ended say of it, and how large a difference they would have shown."""
        gap = _gap(runs, self.one, self.other)
        evidence = _tell(gap, self.one, self.other)
        if gap is None or gap.error is None:
            return Finding(_sign(gap), evidence)
        is_same = abs(gap.value) <= LIMIT * gap.error
        shown = f"; a difference above {LIMIT * gap.error:.4f} would have shown" if is_same else ""
        return Finding(HELD if is_same else NOT_HELD, evidence + shown)


@dataclass(frozen=True)
class Optimum:
    """The lowest of some settings ends below every one of others.

    Attributes:
        text: the claim in words.
        inner: settings among which the lowest is to be.
        outer: settings around them.
    """

    text: str
    inner: tuple[str, ...]
    outer: tuple[str, ...]

    def judge(self, runs: Runs) -> Finding:
        """Return what the runs that have ended say of it; the lowest of several means is a little lower by luck."""
        missing = [name for name in (*self.inner, *self.outer) if name not in runs]
        if missing:
            return Finding(NOT_RUN, f"no run of {', '.join(missing)} has ended")
        best = min(self.inner, key=lambda name: fmean(run.curve.final_loss for run in runs[name].values()))
        gaps = {other: _gap(runs, best, other) for other in self.outer}
        verdicts = {_sign(gap) for gap in gaps.values()}
        evidence = "; ".join(_tell(gap, best, other) for other, gap in gaps.items())
        return Finding(next(word for word in (NOT_RUN, NOT_HELD, NOISE, HELD) if word in verdicts), evidence)


def _gap(runs: Runs, one: str, other: str) -> Estimate | None:
    """Return the mean difference of two settings, seed by seed; None where no seed has both."""
    found = list(differences(runs.get(one, {}), runs.get(other, {})).values())
    return Estimate.of(found) if found else None


def _sign(gap: Estimate | None) -> str:
    """Say whether a difference is below zero, beyond noise; one seed alone knows no noise."""
    if gap is None:
        return NOT_RUN
    if gap.error is None or abs(gap.value) <= LIMIT * gap.error:
        return NOISE
    return HELD if gap.value < 0 else NOT_HELD


def _tell(gap: Estimate | None, one: str, other: str) -> str:
    if gap is None:
        return f"no seed of both {one} and {other} has ended"
    alone = " (one seed, noise unknown)" if gap.error is None else ""
    return f"{one} less {other}: {gap.signed(4)}{alone}"
