"""Evaluates a grid's finished runs: losses over seeds, and differences from the baseline of the same seed."""

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

# Settings that determine the tokens of the validation loss; losses are comparable only if these are equal.
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
# Columns that follow from the number of steps, as long as their fractions of it are equal.
_COUNTED = ("--lr-warmup-iters", "--lr-decay-iters", "--lr-wsd-decay-iters")


@dataclass(frozen=True)
class SweepResult:
    """A finished run of a grid.

    Attributes:
        curve: loss curve of the run.
        config: settings of the run.
    """

    curve: RunCurve
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.curve.name

    @property
    def phases(self) -> PhaseShares:
        """Bag size and fraction of the steps of each phase with bags."""
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
        """All superposition settings except phases; None for a baseline, where they have no effect."""
        settings = self.config.superposition
        return {
            flag: getattr(settings, flag.removeprefix("--").replace("-", "_")) if self.phases else None
            for flag in (BAG_WEIGHTS, "--tst-superpose", "--tst-objective", "--tst-reinitialize-at-switch")
        }


def read_result(path: Path) -> SweepResult:
    """Read a finished run's directory.

    Raises:
        UserError: if the directory holds no finished run.
    """
    return SweepResult(read_curve(path), load_config(RunDirectory(path).config))


@dataclass(frozen=True)
class SweepSetting:
    """Runs of a grid that differ only in their seed.

    Attributes:
        runs: runs by seed.
        varied: values of the settings that the grid varies, except phases.
        baseline: runs by seed that have no bags and otherwise the same settings; None if there are none.
    """

    runs: Mapping[int, SweepResult]
    varied: Mapping[str, Any]
    baseline: Mapping[int, SweepResult] | None

    @property
    def phases(self) -> PhaseShares:
        """Bag size and fraction of the steps of each phase with bags; empty for a baseline."""
        return next(iter(self.runs.values())).phases

    @property
    def bag_weights(self) -> str:
        """Bag weights of the loss; uniform for a baseline."""
        return str(next(iter(self.runs.values())).superposition[BAG_WEIGHTS] or "uniform")

    @property
    def losses(self) -> list[float]:
        """Final loss of each seed, in nats per token."""
        return [run.curve.final_loss for run in self.runs.values()]

    @property
    def final_loss(self) -> Estimate:
        """Mean final loss over the seeds, in nats per token."""
        return Estimate.of(self.losses)

    def differences(self) -> dict[int, float]:
        """Return each run's final loss minus that of the baseline of the same seed, in nats per token."""
        return differences(self.runs, self.baseline or {}) if self.phases else {}

    @property
    def less_baseline(self) -> Estimate | None:
        """Mean of the differences with its standard error; None if there are no differences."""
        found = list(self.differences().values())
        return Estimate.of(found) if found else None

    @property
    def label(self) -> str:
        """Description of the setting, in words."""
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
    """Return final losses minus those of other runs, for each seed that both have, in nats per token.

    Runs of one seed start from the same weights and read the data in the same order, so the effect of the seed cancels.
    """
    return {seed: run.curve.final_loss - others[seed].curve.final_loss for seed, run in runs.items() if seed in others}


@dataclass(frozen=True)
class _Key:
    """The settings that all runs of one setting share."""

    phases: PhaseShares
    rest: tuple[tuple[str, Any], ...]
    superposition: tuple[tuple[str, Any], ...]


def gather(results: Sequence[SweepResult]) -> list[SweepSetting]:
    """Group the runs of a grid by setting, baselines first.

    Raises:
        UserError: if two runs use different text, or have the same setting and seed.
    """
    found: dict[_Key, dict[int, SweepResult]] = {}
    for result in sorted(results, key=lambda result: (result.phases, result.curve.seed)):
        for flag in _TEXT:
            if result.rest[flag] != results[0].rest[flag]:
                raise UserError(
                    f"{result.name}: differs from {results[0].name} in {flag}, so its loss covers other tokens"
                )
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
    """Return the settings that differ: superposition settings among runs with bags, all others among all runs."""
    bags = [result for result in results if result.phases]
    names = [name for name in results[0].superposition if len({run.superposition[name] for run in bags}) > 1]
    names += [name for name in results[0].rest if len({run.rest[name] for run in results}) > 1]
    return [name for name in names if name not in _COUNTED or "steps" not in names]


@dataclass(frozen=True)
class FinalLossCurves:
    """Final losses over bag size or over step ratio.

    Attributes:
        panels: final losses by panel title, line label and bag size or step ratio.
        axis: label of the horizontal axis.
        baseline_at: value on that axis that means no bags.
        file: file name of the plot.
    """

    panels: Mapping[str, Mapping[str, Mapping[float, Estimate]]]
    axis: str
    baseline_at: float
    file: str


def final_loss_curves(settings: Sequence[SweepSetting]) -> FinalLossCurves | None:
    """Return final losses as curves, if settings differ only in bag size, step ratio and bag weights.

    The curves are over bag size if there are several, with one line per step ratio, and otherwise over step ratio. With
    several of both, each kind of bag weights has its own panel. Return None if the settings do not form a curve.
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
    axis = "bag size s (data tokens per position)" if over_size else "step ratio r (fraction of the steps with bags)"
    return FinalLossCurves(panels, axis, float(over_size), "u_curves.png" if over_size else "ratio_curves.png")
