"""What the ends of a grid's runs show: losses over seeds, and differences from the baseline seed by seed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tst.analysis.compare import Estimate
from megatron_tst.analysis.curves import RunCurve, read_curve
from megatron_tst.analysis.sweep import PhaseShares
from megatron_tst.config import RunConfig, UserError, load_config
from megatron_tst.config.effects import TEXT, effect_of
from megatron_tst.telemetry import RunDirectory

# Settings that decide which tokens a loss is the mean of: with others, losses do not compare.
_TEXT = (
    "--split",
    *(
        f"--{setting.name.replace('_', '-')}"
        for section in ("model", "data")
        for setting in dataclasses.fields(getattr(RunConfig(), section))
        if effect_of(RunConfig, f"{section}.{setting.name}") == TEXT
    ),
)
BAG_WEIGHTS = "--tst-bag-weights"
# Columns that follow from the number of steps, as long as each keeps its share of them.
_COUNTED = ("--lr-warmup-iters", "--lr-decay-iters", "--lr-wsd-decay-iters")


@dataclass(frozen=True)
class SweepResult:
    """How a run of a grid ended.

    Attributes:
        curve: its course.
        config: its settings.
    """

    curve: RunCurve
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run directory."""
        return self.curve.name

    @property
    def phases(self) -> PhaseShares:
        """Bag size and share of the steps of each phase with bags."""
        schedule = self.config.schedule
        return tuple(
            (phase.bag_size, round(phase.num_steps / schedule.num_steps, 3))
            for phase in schedule.phases
            if phase.bag_size > 1
        )

    @cached_property
    def rest(self) -> dict[str, Any]:
        """All settings that a baseline shares with its superposed runs, as flags with their values."""
        counted = {f"--{name}": getattr(self.config.optimizer, name.replace("-", "_"))
                   for name in (flag.removeprefix("--") for flag in _COUNTED)}  # fmt: skip
        return {**self.curve.setting, "steps": self.curve.num_steps, **counted}

    @cached_property
    def superposition(self) -> dict[str, Any]:
        """All settings of superposition, phases apart; None for a baseline, for which they mean nothing."""
        settings = self.config.superposition
        return {
            flag: getattr(settings, flag.removeprefix("--").replace("-", "_")) if self.phases else None
            for flag in (BAG_WEIGHTS, "--tst-superpose", "--tst-objective", "--tst-reinitialize-at-switch")
        }


def read_result(path: Path) -> SweepResult:
    """Read a finished run's directory.

    Raises:
        UserError: if it holds no finished run.
    """
    return SweepResult(read_curve(path), load_config(RunDirectory(path).config))


@dataclass(frozen=True)
class SweepSetting:
    """Runs of a grid that differ in their seed alone.

    Attributes:
        runs: by seed.
        varied: what the grid varies, phases apart, and the value here.
        baseline: runs without bags and otherwise of this setting, by seed; None where there are none.
    """

    runs: Mapping[int, SweepResult]
    varied: Mapping[str, Any]
    baseline: Mapping[int, SweepResult] | None

    @property
    def phases(self) -> PhaseShares:
        """Bag size and share of the steps of each phase with bags; none for a baseline."""
        return next(iter(self.runs.values())).phases

    @property
    def bag_weights(self) -> str:
        """Of the loss; a baseline's are uniform."""
        return str(next(iter(self.runs.values())).superposition[BAG_WEIGHTS] or "uniform")

    @property
    def losses(self) -> list[float]:
        """Final loss of each seed, nats per token."""
        return [run.curve.final_loss for run in self.runs.values()]

    @property
    def final_loss(self) -> Estimate:
        """Over the seeds, nats per token."""
        return Estimate.of(self.losses)

    def differences(self) -> dict[int, float]:
        """Return each run's final loss less that of the baseline with its seed, where there is one: nats per token."""
        return differences(self.runs, self.baseline or {}) if self.phases else {}

    @property
    def less_baseline(self) -> Estimate | None:
        """The mean of the differences, with its standard error; None where no seed has one."""
        found = list(self.differences().values())
        return Estimate.of(found) if found else None

    @property
    def label(self) -> str:
        """What tells it from the others, in words."""
        told = ["baseline"]
        if self.phases:
            sizes, shares = (", ".join(f"{value:g}" for value in values) for values in zip(*self.phases, strict=True))
            told = [f"s = {sizes}; r = {shares}"]
        for flag, value in self.varied.items():
            if isinstance(value, bool):
                told += [heading(flag)] if value else []
            elif value is not None:
                told.append(f"{heading(flag)} {value}")
        return ", ".join(told)


def heading(flag: str) -> str:
    """Return a varied setting's name in words."""
    return flag.removeprefix("--").removeprefix("tst-").replace("-", " ")


def differences(runs: Mapping[int, SweepResult], others: Mapping[int, SweepResult]) -> dict[int, float]:
    """Return final losses less those of other runs, for each seed that both have, in nats per token.

    Runs of one seed begin with the same weights and read in the same order: what a seed does to both cancels.
    """
    return {seed: run.curve.final_loss - others[seed].curve.final_loss for seed, run in runs.items() if seed in others}


@dataclass(frozen=True)
class _Key:
    """What the runs of one setting share."""

    phases: PhaseShares
    rest: tuple[tuple[str, Any], ...]
    superposition: tuple[tuple[str, Any], ...]


def gather(results: Sequence[SweepResult]) -> list[SweepSetting]:
    """Sort the runs of a grid into settings, baselines first.

    Raises:
        UserError: if two runs read other text, or have the same setting and seed.
    """
    found: dict[_Key, dict[int, SweepResult]] = {}
    for result in sorted(results, key=lambda result: (result.phases, result.curve.seed)):
        for flag in _TEXT:
            if result.rest[flag] != results[0].rest[flag]:
                raise UserError(f"{result.name}: differs from {results[0].name} in {flag}; its loss is of other tokens")
        key = _Key(result.phases, tuple(result.rest.items()), tuple(result.superposition.items()))
        twin = found.setdefault(key, {}).setdefault(result.curve.seed, result)
        if twin is not result:
            raise UserError(f"{result.name}: has the setting and seed of {twin.name}")
    groups = list(found.values())
    varied = _varied([next(iter(runs.values())) for runs in groups])
    settings = []
    for runs in groups:
        first = next(iter(runs.values()))
        baseline = next((other for other in groups if _is_baseline(next(iter(other.values())), first)), None)
        values = {**first.rest, **first.superposition}
        settings.append(SweepSetting(runs, {name: values[name] for name in varied}, baseline))
    order = [list(dict.fromkeys(setting.varied[name] for setting in settings)) for name in varied]
    return sorted(
        settings,
        key=lambda setting: (
            bool(setting.phases),
            [values.index(setting.varied[name]) for name, values in zip(varied, order, strict=True)],
            _by_ratio(setting.phases),
        ),
    )


def _by_ratio(phases: PhaseShares) -> list[tuple[float, int]]:
    return [(share, size) for size, share in phases]


def _is_baseline(result: SweepResult, of: SweepResult) -> bool:
    return not result.phases and result.rest == of.rest


def _varied(results: Sequence[SweepResult]) -> list[str]:
    """Return the names of what differs: of superposition among runs with bags, of all else among all runs."""
    bags = [result for result in results if result.phases]
    names = [name for name in results[0].superposition if len({run.superposition[name] for run in bags}) > 1]
    names += [name for name in results[0].rest if len({run.rest[name] for run in results}) > 1]
    return [name for name in names if name not in _COUNTED or "steps" not in names]


@dataclass(frozen=True)
class FinalLossCurves:
    """Final losses over bag size, or over step ratio.

    Attributes:
        panels: by title, then by the line's label: final losses by bag size or step ratio.
        axis: what they are drawn over.
        baseline_at: the value on that axis that means no bags.
        file: name of the picture.
    """

    panels: Mapping[str, Mapping[str, Mapping[float, Estimate]]]
    axis: str
    baseline_at: float
    file: str


def final_loss_curves(settings: Sequence[SweepSetting]) -> FinalLossCurves | None:
    """Return final losses as curves, where settings differ in bag size, step ratio and bag weights alone.

    They lie over bag size if there is more than one, with a line per step ratio, and else over step ratio. With several
    step ratios each kind of bag weights has a panel of its own. None where there is nothing to draw a curve over.
    """
    bags = [setting for setting in settings if setting.phases]
    if any(len(setting.phases) > 1 or set(setting.varied) - {BAG_WEIGHTS} for setting in bags):
        return None
    sizes, ratios = ({setting.phases[0][place] for setting in bags} for place in (0, 1))
    kinds = {setting.bag_weights for setting in bags}
    if len(sizes) < 2 and len(ratios) < 2:
        return None
    over_size, has_lines = len(sizes) > 1, len(sizes) > 1 and len(ratios) > 1
    panels: dict[str, dict[str, dict[float, Estimate]]] = {}
    for setting in bags:
        ((size, ratio),) = setting.phases
        weights = f"{setting.bag_weights.replace('_', ' ')} bag weights"
        fixed = f"step ratio r = {ratio:g}" if over_size else f"bag size s = {size}"
        by_weights = len(kinds) > 1 and not has_lines
        title, label = (fixed, weights) if by_weights else (weights, fixed)
        panels.setdefault(title, {}).setdefault(label, {})[size if over_size else ratio] = setting.final_loss
    axis = "bag size s (data tokens per position)" if over_size else "step ratio r (share of the steps with bags)"
    return FinalLossCurves(panels, axis, float(over_size), "u_curves.png" if over_size else "ratio_curves.png")
