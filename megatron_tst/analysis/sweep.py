"""Plans a grid of runs over phases, bag weights, lengths and any other setting, with the baselines that it needs."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from megatron_tst.analysis.curves import is_decayed, read_curve
from megatron_tst.config import (
    RunConfig,
    SuperpositionSettings,
    UserError,
    check_config,
    dump_config,
    load_config,
    read_config,
)
from megatron_tst.superposition import Phase
from megatron_tst.telemetry import RunDirectory

# Bag size and fraction of the steps of each phase with bags; the remaining steps are ordinary training.
PhaseShares = tuple[tuple[int, float], ...]
# Settings that the grid varies by flags of its own.
_OWN = {
    "seed": "--seeds", "train_iters": "--steps", "tst_bag_size": "--bag-sizes", "tst_step_ratio": "--step-ratios",
    "tst_steps": "--step-ratios", "tst_bag_weights": "--bag-weights", "tst_run_dir": "--output", "load": "--output",
}  # fmt: skip
_SECTION = {
    setting.name: section.name
    for section in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(section.type)
    for setting in dataclasses.fields(section.type)
}


@dataclass(frozen=True)
class Grid:
    """The values that a grid varies; every combination is one setting, which is trained once per seed.

    Attributes:
        phases: lists of phases with bags.
        bag_weights: bag weights of the loss.
        settings: values of other settings by name, as on the command line.
        lengths: numbers of optimizer steps; empty takes the number in the flags.
        seeds: seeds of the weights and the data order.
    """

    phases: Sequence[PhaseShares]
    bag_weights: Sequence[str] = ("uniform",)
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    seeds: Sequence[int] = (1,)


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a grid.

    Attributes:
        phases: phases with bags, in order; empty for a baseline.
        bag_weights: bag weights of the loss.
        settings: names and values of the other settings that the grid varies.
        num_steps: number of steps of the run; None takes the number in the flags.
    """

    phases: PhaseShares = ()
    bag_weights: str = "uniform"
    settings: tuple[tuple[str, str], ...] = ()
    num_steps: int | None = None


@dataclass(frozen=True)
class SweepRun:
    """One run of a grid.

    Attributes:
        point: setting of the run.
        seed: seed of the weights and the data order.
        directory: directory of the run.
        config: all settings of the run.
    """

    point: SweepPoint
    seed: int
    directory: RunDirectory
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.directory.path.name

    @property
    def argv(self) -> tuple[str, ...]:
        """Arguments of pretrain_tst.py that start or resume the run."""
        return "--config", str(self._settings), "--tst-run-dir", str(self.directory.path)

    @property
    def _settings(self) -> Path:
        return self.directory.path.with_name(f"{self.name}.yaml")

    def write_settings(self) -> None:
        """Write the settings file that the arguments name."""
        self._settings.write_text(dump_config(self.config), encoding="utf-8")

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished.

        Raises:
            UserError: if its directory holds a run with other settings.
        """
        directory = self.directory
        if not directory.config.is_file():
            return False
        if load_config(directory.config) != dataclasses.replace(self.config, config=()):
            raise UserError(f"{directory.path}: holds a run with other settings; choose another --output")
        try:
            read_curve(directory.path)
        except UserError:  # not evaluated at its end
            return False
        return True


def grid_phases(bag_sizes: Sequence[int], step_ratios: Sequence[float]) -> list[PhaseShares]:
    """Return the paper's two-phase schedule for each bag size s above 1 and step ratio r above 0.

    Raises:
        UserError: if a value is out of range.
    """
    for size in bag_sizes:
        if size < 2:
            raise UserError(f"--bag-sizes {size}: must be above 1; the baseline, bag size 1, is always run")
    for ratio in step_ratios:
        if not 0 < ratio <= 1:
            raise UserError(f"--step-ratios {ratio}: must be above 0 and at most 1")
    return [((size, ratio),) for ratio in step_ratios for size in bag_sizes]


def read_phases(text: str) -> PhaseShares:
    """Read the phases with bags from ``8:0.1,4:0.2``: bag sizes with their fractions of the steps.

    Raises:
        UserError: if the text is not such a list, or the fractions exceed 1 in total.
    """
    try:
        pairs = [(size, share) for size, share in (entry.split(":") for entry in text.split(","))]
        phases = tuple((int(size), float(share)) for size, share in pairs)
    except ValueError:
        phases = ()
    total = sum(share for _, share in phases)
    if not phases or total > 1 + 1e-9 or any(size < 2 or not 0 < share <= 1 for size, share in phases):
        raise UserError(
            f"--phases {text}: must be bag sizes above 1 with their fractions of the steps, such as 8:0.1,4:0.2; "
            "the remaining steps are ordinary training"
        )
    return phases


def plan_sweep(grid: Grid, output: Path, flags: Sequence[str]) -> list[SweepRun]:
    """Return the runs of a grid, seed by seed, with each seed's baselines first.

    There is one baseline for each combination of the settings that do not concern superposition.

    Args:
        grid: values to vary.
        output: folder of the run directories.
        flags: flags of pretrain_tst.py that all runs share.

    Raises:
        UserError: if a value is out of range or cannot be combined with the flags.
    """
    _check_grid(grid)
    concerns_bags = {name: name in _fields(SuperpositionSettings) for name in grid.settings}
    points = []
    for steps in grid.lengths or (None,):
        points += [SweepPoint(settings=chosen, num_steps=steps) for chosen in _combine(grid, concerns_bags, False)]
        points += [
            SweepPoint(phases, weights, chosen, steps)
            for chosen in _combine(grid, concerns_bags, True)
            for weights in grid.bag_weights
            for phases in grid.phases
        ]
    base = read_config(flags)
    settings = [(point, _plan_point(point, flags)) for point in points]
    names = [_name(point, base, config) for point, config in settings]
    if twins := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twins[0]}: the grid holds this setting twice")
    return [
        _plan_run(point, config, output / f"{name}-seed{seed}", seed)
        for seed in grid.seeds
        for name, (point, config) in zip(names, settings, strict=True)
    ]


def _fields(kind: Any) -> set[str]:
    return {setting.name for setting in dataclasses.fields(kind)}


def _check_grid(grid: Grid) -> None:
    listed = {"bag-weights": grid.bag_weights, "seeds": grid.seeds, "steps": grid.lengths, "phases": grid.phases}
    listed |= {f"vary {name}": values for name, values in grid.settings.items()}
    for flag, values in listed.items():
        if len(set(values)) < len(values):
            raise UserError(f"--{flag} {' '.join(map(str, values))}: holds a value twice")
    for steps in grid.lengths:
        if steps < 1:
            raise UserError(f"--steps {steps}: must be above 0")
    for name in grid.settings:
        if name in _OWN:
            raise UserError(f"--vary {name}: use {_OWN[name]} to vary this setting")
        if name not in _SECTION:
            raise UserError(f"--vary {name}: is not a setting of pretrain_tst.py")


def _combine(grid: Grid, concerns_bags: Mapping[str, bool], with_bags: bool) -> list[tuple[tuple[str, str], ...]]:
    """Return every combination of the other settings; for baselines, only of those that do not concern bags."""
    names = [name for name in grid.settings if with_bags or not concerns_bags[name]]
    return [
        tuple(zip(names, values, strict=True)) for values in itertools.product(*(grid.settings[name] for name in names))
    ]


def _plan_point(point: SweepPoint, flags: Sequence[str]) -> RunConfig:
    """Return the settings that all runs of a point share."""
    own = {"tst_bag_weights": point.bag_weights, **dict(point.settings)}
    config = read_config([*flags, *(text for name, value in own.items() for text in _as_flags(name, value))])
    if not point.phases:
        config = _replace(config, "superposition", tst_reinitialize_at_switch=False)
    return _with_phases(_with_steps(config, point.num_steps), point)


def _plan_run(point: SweepPoint, config: RunConfig, folder: Path, seed: int) -> SweepRun:
    directory = RunDirectory(folder)
    config = _replace(config, "training", seed=seed)
    config = _replace(config, "logging", tst_run_dir=str(folder))
    # With --load, one command both starts and resumes the run.
    config = _replace(config, "checkpoint", load=str(directory.checkpoints))
    check_config(config)
    if not is_decayed(config):
        raise UserError(
            f"--lr-decay-iters {config.optimizer.lr_decay_iters}: exceeds the runs' {config.schedule.num_steps} "
            "steps; a grid compares losses after the decay"
        )
    if not config.training.eval_iters:
        raise UserError("--eval-iters 0: a grid compares validation losses")
    return SweepRun(point, seed, directory, config)


def _replace(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _as_flags(name: str, value: str) -> list[str]:
    """Return the flags that set a value; a boolean setting has one flag per value instead of an argument."""
    flag = name.replace("_", "-")
    kind = next(f.type for f in dataclasses.fields(RunConfig) if f.name == _SECTION[name])
    if get_type_hints(kind)[name] is not bool:
        return [f"--{flag}", value]
    if value.lower() not in ("true", "false"):
        raise UserError(f"--vary {name} {value}: must be true or false")
    return [f"--{flag}" if value.lower() == "true" else f"--no-{flag}"]


def _with_steps(config: RunConfig, num_steps: int | None) -> RunConfig:
    """Return the settings for another number of steps; warm-up, decay and intervals scale with it."""
    before = config.training.train_iters
    if num_steps is None or before is None or num_steps == before:
        return config

    def scaled(steps: int | None) -> int | None:
        """Return the same fraction of the new length, but at least one step unless there was none."""
        return steps and max(round(steps * num_steps / before), 1)

    for section, names in (
        ("training", ("train_iters", "eval_interval")),
        ("optimizer", ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters")),
        ("logging", ("log_interval",)),
    ):
        values = {name: scaled(getattr(getattr(config, section), name)) for name in names}
        config = _replace(config, section, **values)
    return config


def _with_phases(config: RunConfig, point: SweepPoint) -> RunConfig:
    """Return the settings with a point's phases: a single phase as bag size and step ratio, several as a list."""
    total, phases = config.training.train_iters, []
    if total is None:
        raise UserError("--train-iters None: must be given")
    done, share_done = 0, 0.0
    for size, share in point.phases:
        share_done += share
        steps = round(share_done * total) - done
        if steps < 1:
            raise UserError(f"{_phases_flag(point)}: the fraction {share:g} of {total} steps is less than one step")
        phases.append(Phase(size, steps, config.superposition.tst_superpose != "output"))
        done += steps
    if len(phases) < 2:
        size, share = point.phases[0] if phases else (1, 0.0)
        config = _replace(config, "superposition", tst_bag_size=size, tst_step_ratio=share, tst_steps=None)
        return dataclasses.replace(config, phases=())
    config = _replace(config, "superposition", tst_bag_size=1, tst_step_ratio=0.0, tst_steps=None)
    rest = (Phase(1, total - done),) if total > done else ()
    return dataclasses.replace(config, phases=(*phases, *rest))


def _phases_flag(point: SweepPoint) -> str:
    if len(point.phases) == 1:
        return f"--step-ratios {point.phases[0][1]:g}"
    return f"--phases {','.join(f'{size}:{share:g}' for size, share in point.phases)}"


def _name(point: SweepPoint, base: RunConfig, config: RunConfig) -> str:
    """Return a name that is unique for a setting, and equal in every grid with the same flags."""
    parts = ["-".join(f"s{size}-r{share:g}" for size, share in point.phases) or "baseline"]
    if point.bag_weights != "uniform":
        parts.append(point.bag_weights)
    for name, _ in point.settings:
        value, usual = (getattr(getattr(some, _SECTION[name]), name) for some in (config, base))
        if value != usual:
            parts.append(_label(name.removeprefix("tst_"), value))
    if config.training.train_iters != base.training.train_iters:
        parts.append(f"{config.training.train_iters}steps")
    return "-".join(parts)


def _label(name: str, value: Any) -> str:
    if value is True:
        return name
    told = (
        f"{value:g}" if isinstance(value, float) else " ".join(map(str, value)) if isinstance(value, tuple) else value
    )
    return re.sub(r"[^\w.+-]", "_", f"{name}_{told}")
