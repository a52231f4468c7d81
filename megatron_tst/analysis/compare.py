"""Compares finished runs as the paper does: at equal FLOPs, at equal data and at equal loss.

Only the ends of runs are compared, because there the learning rate has decayed. A point in the middle of a curve, such
as where it crosses another run's final loss, is not comparable. A speed-up at equal loss is therefore interpolated
between the ends of runs of different lengths.
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

# Two runs count as having equal FLOPs or equal data if these differ by less than this fraction.
TOLERANCE = 0.02
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        value: mean over the seeds.
        error: standard error of the mean; None if there is only one seed.
    """

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the mean of one value per seed, with its standard error."""
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def write(self, digits: int) -> str:
        """Format the mean with its standard error: ``2.6731 ± 0.0042``."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.value:.{digits}f}{error}"

    def signed(self, digits: int) -> str:
        """Format a difference with its sign: ``+0.0102 ± 0.0042``."""
        return ("+" if self.value > 0 else "") + self.write(digits)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        name: common prefix of the runs' names.
        runs: runs, one per seed.
    """

    name: str
    runs: tuple[RunCurve, ...]

    @property
    def final_loss(self) -> Estimate:
        """Mean final loss over the seeds, in nats per token."""
        return Estimate.of([run.final_loss for run in self.runs])

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of each run."""
        return self.runs[0].num_steps

    def total(self, axis: str) -> float:
        """Return the mean total of the runs on an axis."""
        return fmean(run.total(axis) for run in self.runs)

    @property
    def seeds(self) -> set[int]:
        """Seeds of the runs."""
        return {run.seed for run in self.runs}

    def loss(self, without: int | None = None) -> float:
        """Return the mean final loss over all seeds, or over all seeds except one."""
        return fmean(run.final_loss for run in self.runs if run.seed != without)


@dataclass(frozen=True)
class Method:
    """Groups that differ only in their length, the shortest first."""

    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        """Common prefix of the groups' names."""
        return _common_name([group.name for group in self.groups])

    def ends(self, without: int | None = None) -> list[tuple[float, float]]:
        """Return FLOPs and mean final loss of each length, over all seeds or over all seeds except one."""
        return [(group.total("flops"), group.loss(without)) for group in self.groups]


def find_methods(curves: Iterable[RunCurve]) -> list[Method]:
    """Group runs by method, and each method's runs by length, in the order of their first runs.

    Raises:
        UserError: if two runs have the same settings and the same seed.
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
    """Return the common prefix of names in whole words and numbers: tst-seed10 and tst-seed11 give tst."""
    if len(set(names)) == 1:
        return names[0]
    parts = zip(*(re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+", name) for name in names), strict=False)
    prefix = "".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    return prefix.rstrip("-_. /").removesuffix("seed").rstrip("-_. /") or names[0]


def difference(group: Group, baseline: Group) -> Estimate:
    """Return a group's mean final loss minus the baseline's; if both have the same seeds, the error is paired."""
    if group.seeds == baseline.seeds:
        before = {run.seed: run.final_loss for run in baseline.runs}
        return Estimate.of([run.final_loss - before[run.seed] for run in group.runs])
    ours, theirs = group.final_loss, baseline.final_loss
    known = ours.error is not None and theirs.error is not None
    return Estimate(ours.value - theirs.value, math.hypot(ours.error or 0, theirs.error or 0) if known else None)


def counterpart(group: Group, method: Method, axis: str) -> Group | None:
    """Return the group of another method with the same total on an axis, or None."""
    wanted = group.total(axis)
    nearest = min(method.groups, key=lambda other: abs(other.total(axis) - wanted))
    return nearest if abs(nearest.total(axis) / wanted - 1) < TOLERANCE else None


@dataclass(frozen=True)
class SpeedUp:
    """The factor by which a method needs fewer FLOPs than the baseline to reach a loss.

    Attributes:
        anchor: group whose final loss is reached.
        ratio: baseline's FLOPs divided by the method's, one of which is interpolated between two lengths.
    """

    anchor: Group
    ratio: Estimate


@dataclass(frozen=True)
class SpeedUpBound:
    """A bound on the speed-up that follows from two ends.

    Attributes:
        ratio: FLOPs of the baseline's end divided by those of the method's end.
        is_lower: whether this is a lower bound, because the method's end is not higher; otherwise it is an upper bound.
        group: group of the method.
        baseline: group of the baseline.
    """

    ratio: float
    is_lower: bool
    group: Group
    baseline: Group


def speed_ups(method: Method, baseline: Method) -> list[SpeedUp] | list[SpeedUpBound]:
    """Return the speed-ups at equal loss that follow from the ends of two methods' runs.

    If a final loss of one method lies between those of two lengths of the other, the logarithm of the FLOPs is
    interpolated linearly over the loss between these two, with means over seeds. The standard error is that of the
    jackknife, which leaves out each seed in turn. It is known only if all ends have the same seeds, at least two, and
    each mean without one seed also lies between two lengths. If no such pair exists, the tightest bounds are returned.
    """
    found = [
        *(_speed_up(group, baseline, 1) for group in method.groups),
        *(_speed_up(group, method, -1) for group in baseline.groups),
    ]
    between = [speed_up for speed_up in found if speed_up]
    return between or _bounds(method, baseline)


def _speed_up(anchor: Group, other: Method, sign: int) -> SpeedUp | None:
    """Compare an end with another method; ``sign`` is 1 if the other method is the baseline, otherwise -1."""

    def ratio(without: int | None = None) -> float | None:
        """Return the speed-up over all seeds, or over all seeds except one."""
        flops = _interpolate(other.ends(without), anchor.loss(without))
        return None if flops is None else float((flops / anchor.total("flops")) ** sign)

    value = ratio()
    if value is None:
        return None
    seeds = anchor.seeds
    are_paired = len(seeds) > 1 and all(group.seeds == seeds for group in other.groups)
    return SpeedUp(anchor, Estimate(value, _jackknife([ratio(seed) for seed in seeds]) if are_paired else None))


def _jackknife(left_out: Sequence[float | None]) -> float | None:
    """Return the standard error of an estimate from the estimates without each seed, or None if one is missing."""
    known = [value for value in left_out if value is not None]
    count = len(left_out)
    return stdev(known) * (count - 1) / math.sqrt(count) if len(known) == count else None


def _bounds(method: Method, baseline: Method) -> list[SpeedUpBound]:
    """Return the tightest lower and the tightest upper bound; every pair of ends gives one bound."""
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
    """Return the FLOPs at which the ends, ordered by length, reach a loss.

    Return None if they never reach it, or if they cross it several times, because noise then decides which crossing is
    the first.
    """
    crossings = [pair for pair in itertools.pairwise(ends) if (pair[0][1] > loss) != (pair[1][1] > loss)]
    if len(crossings) != 1:
        return None
    ((less, above), (more, below)) = crossings[0]
    if above < below:
        return None
    share = (above - loss) / (above - below)
    return less * math.exp(share * math.log(more / less))
