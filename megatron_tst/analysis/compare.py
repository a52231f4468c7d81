"""Compare finished runs as the paper does: at equal FLOPs, at equal data, at equal loss.

Only ends of runs are compared: a run's final loss is final because its own learning rate has decayed, and the point
at which a curve crosses another run's final loss is not. So a speed-up at equal loss is read off between the ends of
runs of different lengths.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

from megatron_tst.analysis.curves import RunCurve
from megatron_tst.config import UserError

# Two runs have equal FLOPs or data when these differ by less than this share.
TOLERANCE = 0.02
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        value: the mean.
        error: its standard error; None where one seed alone tells.
    """

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Take the mean of what the seeds gave."""
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def write(self, digits: int) -> str:
        """Write it with its uncertainty: ``2.6731 ± 0.0042``."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.value:.{digits}f}{error}"

    def signed(self, digits: int) -> str:
        """Write a difference, a plus in front of what is above zero: ``+0.0102 ± 0.0042``."""
        return ("+" if self.value > 0 else "") + self.write(digits)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        name: what their names have in common.
        runs: one per seed.
    """

    name: str
    runs: tuple[RunCurve, ...]

    @property
    def final_loss(self) -> Estimate:
        """Over the seeds, nats per token."""
        return Estimate.of([run.final_loss for run in self.runs])

    @property
    def num_steps(self) -> int:
        """Optimizer steps of each run."""
        return self.runs[0].num_steps

    def total(self, axis: str) -> float:
        """Return what a run took on an axis, in the mean."""
        return fmean(run.total(axis) for run in self.runs)

    @property
    def seeds(self) -> set[int]:
        """Of the runs."""
        return {run.seed for run in self.runs}

    def loss(self, without: int | None = None) -> float:
        """Return the mean final loss, of all seeds or of all but one."""
        return fmean(run.final_loss for run in self.runs if run.seed != without)


@dataclass(frozen=True)
class Method:
    """Groups that differ in their length alone, the shortest first."""

    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        """What the groups' names have in common."""
        return _common_name([group.name for group in self.groups])

    def ends(self, without: int | None = None) -> list[tuple[float, float]]:
        """Return FLOPs and mean final loss of each length, of all seeds or of all but one."""
        return [(group.total("flops"), group.loss(without)) for group in self.groups]


def find_methods(curves: Iterable[RunCurve]) -> list[Method]:
    """Sort runs into methods, and each method's runs into groups of one length, in the order they come in.

    Raises:
        UserError: if two runs differ in nothing, not even their seed.
    """
    methods = []
    for runs in _gather(curves, lambda curve: curve.method):
        lengths = sorted(_gather(runs, lambda curve: curve.length), key=lambda same: same[0].num_steps)
        for same in lengths:
            for twins in _gather(same, lambda curve: curve.seed):
                if len(twins) > 1:
                    names = " and ".join(run.name for run in twins)
                    raise UserError(f"{names}: have the same settings and seed {twins[0].seed}; name one of them")
        methods.append(Method(tuple(Group(_common_name([run.name for run in same]), tuple(same)) for same in lengths)))
    return methods


def _gather(items: Iterable[_Item], key: Callable[[_Item], object]) -> list[list[_Item]]:
    found: dict[object, list[_Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def _common_name(names: Sequence[str]) -> str:
    """Return the whole words and numbers that names begin with alike: tst-seed10 and tst-seed11 are tst."""
    if len(set(names)) == 1:
        return names[0]
    parts = zip(*(re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+", name) for name in names), strict=False)
    prefix = "".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    return prefix.rstrip("-_. /").removesuffix("seed").rstrip("-_. /") or names[0]


def difference(group: Group, baseline: Group) -> Estimate:
    """Return a group's mean final loss less the baseline's; its error is of seed by seed, where both have the same."""
    if group.seeds == baseline.seeds:
        before = {run.seed: run.final_loss for run in baseline.runs}
        return Estimate.of([run.final_loss - before[run.seed] for run in group.runs])
    ours, theirs = group.final_loss, baseline.final_loss
    known = ours.error is not None and theirs.error is not None
    return Estimate(ours.value - theirs.value, math.hypot(ours.error or 0, theirs.error or 0) if known else None)


def counterpart(group: Group, method: Method, axis: str) -> Group | None:
    """Return the group of another method that took as much on an axis, or None."""
    wanted = group.total(axis)
    nearest = min(method.groups, key=lambda other: abs(other.total(axis) - wanted))
    return nearest if abs(nearest.total(axis) / wanted - 1) < TOLERANCE else None


@dataclass(frozen=True)
class SpeedUp:
    """How many times fewer FLOPs a method needs than the baseline for one loss.

    Attributes:
        anchor: the group whose final loss it is.
        ratio: the baseline's FLOPs over the method's, one of them interpolated between two lengths.
    """

    anchor: Group
    ratio: Estimate


@dataclass(frozen=True)
class SpeedUpBound:
    """What two ends alone say of the speed-up.

    Attributes:
        ratio: the FLOPs of the baseline's end over those of the method's.
        is_lower: whether the speed-up is at least this, because the method's end is no higher; else it is less.
        group: of the method.
        baseline: the baseline's.
    """

    ratio: float
    is_lower: bool
    group: Group
    baseline: Group


def speed_ups(method: Method, baseline: Method) -> list[SpeedUp] | list[SpeedUpBound]:
    """Return the speed-ups at equal loss that the ends of two methods' runs show.

    Where a final loss of one lies between those of two lengths of the other, FLOPs are interpolated between these:
    logarithm of the FLOPs against loss, both means over seeds. The standard error is the jackknife's, each seed left
    out in turn; it is known where all ends have the same seeds, two or more, and each such mean lies between two
    lengths too. Where no loss lies so, the tightest bounds.
    """
    found = [
        *(_speed_up(group, baseline, 1) for group in method.groups),
        *(_speed_up(group, method, -1) for group in baseline.groups),
    ]
    between = [speed_up for speed_up in found if speed_up]
    return between or _bounds(method, baseline)


def _speed_up(anchor: Group, other: Method, sign: int) -> SpeedUp | None:
    """Compare an end with another method; ``sign`` is 1 where the other one is the baseline, else -1."""

    def ratio(without: int | None = None) -> float | None:
        """Return the speed-up, of all seeds or of all but one."""
        flops = _interpolate(other.ends(without), anchor.loss(without))
        return None if flops is None else float((flops / anchor.total("flops")) ** sign)

    value = ratio()
    if value is None:
        return None
    seeds = anchor.seeds
    are_paired = len(seeds) > 1 and all(group.seeds == seeds for group in other.groups)
    return SpeedUp(anchor, Estimate(value, _jackknife([ratio(seed) for seed in seeds]) if are_paired else None))


def _jackknife(left_out: Sequence[float | None]) -> float | None:
    """Return the standard error of an estimate, from the estimates without each seed; None where one is missing."""
    known = [value for value in left_out if value is not None]
    count = len(left_out)
    return stdev(known) * (count - 1) / math.sqrt(count) if len(known) == count else None


def _bounds(method: Method, baseline: Method) -> list[SpeedUpBound]:
    """Return the tightest lower and upper bound that there are: every pair of ends gives one."""
    bounds = [
        SpeedUpBound(theirs.total("flops") / ours.total("flops"), difference(ours, theirs).value <= 0, ours, theirs)
        for ours in method.groups
        for theirs in baseline.groups
    ]
    lower = [bound for bound in bounds if bound.is_lower]
    upper = [bound for bound in bounds if not bound.is_lower]
    key = operator.attrgetter("ratio")
    return [*([max(lower, key=key)] if lower else []), *([min(upper, key=key)] if upper else [])]


def _interpolate(ends: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return the FLOPs at which ends, from the shortest run on, reach a loss.

    None where they never do, or more than once: noise then decides which of the places is the first.
    """
    crossings = [pair for pair in itertools.pairwise(ends) if (pair[0][1] > loss) != (pair[1][1] > loss)]
    if len(crossings) != 1:
        return None
    ((less, above), (more, below)) = crossings[0]
    if above < below:
        return None
    share = (above - loss) / (above - below)
    return less * math.exp(share * math.log(more / less))
