"""Tests claims about final losses on the runs of a grid, taking the noise between seeds into account."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from megatron_tst.analysis.compare import Estimate
from megatron_tst.analysis.sweep_results import SweepResult, differences

# A mean difference counts if it is at least this many standard errors from zero. With three or more seeds, the chance
# of finding a difference in the claimed direction although there is none is then at most 1 in 20 (Student's t,
# one-sided).
LIMIT, FEWEST_SEEDS = 3.0, 3
HELD, NOT_HELD, NOISE, NOT_RUN = "held", "not held", "within noise", "not run"

# Runs by setting, which is the name of their directory without the seed, and by seed.
Runs = Mapping[str, Mapping[int, SweepResult]]


def by_setting(results: Sequence[SweepResult]) -> dict[str, dict[int, SweepResult]]:
    """Group runs of one length by the names of their settings and by seed."""
    found: dict[str, dict[int, SweepResult]] = {}
    for result in results:
        setting = re.sub(r"(-\d+steps)?-seed\d+$", "", result.name)
        found.setdefault(setting, {})[result.curve.seed] = result
    return found


@dataclass(frozen=True)
class Finding:
    """The result of testing a claim.

    Attributes:
        verdict: "held", "not held", "within noise" or "not run".
        evidence: differences that the verdict is based on, in words.
    """

    verdict: str
    evidence: str


class Claim(Protocol):
    """A claim about settings, which are named like their run directories without the seed."""

    text: str

    def judge(self, runs: Runs) -> Finding:
        """Test the claim on the finished runs."""


@dataclass(frozen=True)
class Below:
    """The claim that one setting ends with a lower loss than another.

    Attributes:
        text: claim in words.
        lower: setting with the lower final loss.
        higher: setting with the higher final loss.
    """

    text: str
    lower: str
    higher: str

    def judge(self, runs: Runs) -> Finding:
        """Test the claim on the finished runs."""
        gaps = _gaps(runs, self.lower, self.higher)
        return Finding(_sign(gaps), _tell(gaps, self.lower, self.higher))


@dataclass(frozen=True)
class Same:
    """The claim that two settings end with equal losses.

    Attributes:
        text: claim in words.
        one: first setting.
        other: second setting.
    """

    text: str
    one: str
    other: str

    def judge(self, runs: Runs) -> Finding:
        """Test the claim on the finished runs, and state how large a difference they would have detected."""
        gaps = _gaps(runs, self.one, self.other)
        evidence = _tell(gaps, self.one, self.other)
        if len(gaps) < FEWEST_SEEDS:
            return Finding(_sign(gaps), evidence)
        if _sign(gaps) != NOISE:
            return Finding(NOT_HELD, evidence)
        shown = LIMIT * (Estimate.of(gaps).error or 0.0)
        return Finding(HELD, f"{evidence}; a difference above {shown:.4f} would have been detected")


@dataclass(frozen=True)
class Optimum:
    """The claim that the best of some settings ends with a lower loss than each of some others.

    Attributes:
        text: claim in words.
        inner: settings among which the best one is claimed to be.
        outer: settings that the best one is compared with.
    """

    text: str
    inner: tuple[str, ...]
    outer: tuple[str, ...]

    def judge(self, runs: Runs) -> Finding:
        """Test the claim on the finished runs; the minimum of several means is biased slightly downwards."""
        missing = [name for name in (*self.inner, *self.outer) if name not in runs]
        if missing:
            return Finding(NOT_RUN, f"no run of {', '.join(missing)} has finished")
        best = min(self.inner, key=lambda name: fmean(run.curve.final_loss for run in runs[name].values()))
        found = {other: _gaps(runs, best, other) for other in self.outer}
        verdicts = {_sign(gaps) for gaps in found.values()}
        evidence = "; ".join(_tell(gaps, best, other) for other, gaps in found.items())
        return Finding(next(word for word in (NOT_RUN, NOT_HELD, NOISE, HELD) if word in verdicts), evidence)


def _gaps(runs: Runs, one: str, other: str) -> list[float]:
    """Return the differences between two settings for each seed that both have."""
    return list(differences(runs.get(one, {}), runs.get(other, {})).values())


def _sign(gaps: Sequence[float]) -> str:
    """Return whether the mean difference is below zero by more than noise; with too few seeds it is within noise."""
    if not gaps:
        return NOT_RUN
    mean = Estimate.of(gaps)
    if len(gaps) < FEWEST_SEEDS or abs(mean.value) <= LIMIT * (mean.error or 0.0):
        return NOISE
    return HELD if mean.value < 0 else NOT_HELD


def _tell(gaps: Sequence[float], one: str, other: str) -> str:
    if not gaps:
        return f"no seed has finished runs of both {one} and {other}"
    few = f" ({len(gaps)} of at least {FEWEST_SEEDS} seeds)" if len(gaps) < FEWEST_SEEDS else ""
    return f"{one} minus {other}: {Estimate.of(gaps).signed(4)}{few}"
