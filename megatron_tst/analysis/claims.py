"""Whether what is claimed of final losses holds in the runs of a grid, beyond the noise of their seeds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from megatron_tst.analysis.compare import Estimate
from megatron_tst.analysis.sweep_results import SweepResult, differences

# A mean difference speaks where it is as many standard errors from zero. From three seeds on, that leaves a chance of
# one in twenty at most for a difference in the claimed direction where there is none (Student's t, one-sided).
LIMIT, FEWEST_SEEDS = 3.0, 3
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
        gaps = _gaps(runs, self.lower, self.higher)
        return Finding(_sign(gaps), _tell(gaps, self.lower, self.higher))


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
        gaps = _gaps(runs, self.one, self.other)
        evidence = _tell(gaps, self.one, self.other)
        if len(gaps) < FEWEST_SEEDS:
            return Finding(_sign(gaps), evidence)
        if _sign(gaps) != NOISE:
            return Finding(NOT_HELD, evidence)
        shown = LIMIT * (Estimate.of(gaps).error or 0.0)
        return Finding(HELD, f"{evidence}; a difference above {shown:.4f} would have shown")


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
        found = {other: _gaps(runs, best, other) for other in self.outer}
        verdicts = {_sign(gaps) for gaps in found.values()}
        evidence = "; ".join(_tell(gaps, best, other) for other, gaps in found.items())
        return Finding(next(word for word in (NOT_RUN, NOT_HELD, NOISE, HELD) if word in verdicts), evidence)


def _gaps(runs: Runs, one: str, other: str) -> list[float]:
    """Return the differences of two settings, of each seed that has both."""
    return list(differences(runs.get(one, {}), runs.get(other, {})).values())


def _sign(gaps: Sequence[float]) -> str:
    """Say whether a difference is below zero, beyond noise, which few seeds do not know."""
    if not gaps:
        return NOT_RUN
    mean = Estimate.of(gaps)
    if len(gaps) < FEWEST_SEEDS or abs(mean.value) <= LIMIT * (mean.error or 0.0):
        return NOISE
    return HELD if mean.value < 0 else NOT_HELD


def _tell(gaps: Sequence[float], one: str, other: str) -> str:
    if not gaps:
        return f"no seed of both {one} and {other} has ended"
    few = f" ({len(gaps)} of at least {FEWEST_SEEDS} seeds)" if len(gaps) < FEWEST_SEEDS else ""
    return f"{one} less {other}: {Estimate.of(gaps).signed(4)}{few}"
