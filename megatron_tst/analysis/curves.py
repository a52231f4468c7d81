"""The course of a run, read from its directory."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.config import RunConfig, UserError, load_config
from megatron_tst.config.effects import TEXT, Effect, effect_of
from megatron_tst.telemetry.metrics import read_metrics
from megatron_tst.telemetry.run_directory import RunDirectory

AXES = ("steps", "data_tokens", "flops", "gpu_hours")


@dataclass(frozen=True)
class Superposition:
    """How a run superposes.

    Attributes:
        phases: bag size, whether bags are read, and fraction of the steps of each phase.
        bag_weights: of the loss; None without bags, as the next two.
        objective: of the loss.
        reinitializes: whether embedding and output layer are drawn anew where bags end.
    """

    phases: tuple[tuple[int, bool, float], ...]
    bag_weights: str | None = None
    objective: str | None = None
    reinitializes: bool | None = None


@dataclass(frozen=True)
class RunLength:
    """All that is counted in steps.

    Attributes:
        phases: steps of each phase.
        warmup: of the learning rate.
        decay_end: where its decay ends; the end of the run where None.
        wsd_decay: of the final decay, with WSD.
    """

    phases: tuple[int, ...]
    warmup: int
    decay_end: int | None
    wsd_decay: int | None


@dataclass(frozen=True)
class RunMethod:
    """What runs share that differ in seed and length alone.

    Attributes:
        setting: flags with their values.
        superposition: how they superpose.
    """

    setting: tuple[tuple[str, Any], ...]
    superposition: Superposition


@dataclass(frozen=True)
class RunCurve:
    """The course of one run.

    Attributes:
        name: of the run directory.
        seed: of the run.
        setting: what runs share that differ in superposition, seed and length alone: flags with their values.
        superposition: how it superposes.
        length: all that is counted in steps.
        losses: next-token validation loss of each evaluation, nats per token.
        axes: where each evaluation lies on each of :data:`AXES`.
        switches: steps after which the bag size changes.
        bag_sizes: of the phases, in order.
        recovery: what was told of the last switch: ``spike`` in nats and ``recovery_steps``; None without one.
    """

    name: str
    seed: int
    setting: Mapping[str, Any]
    superposition: Superposition
    length: RunLength
    losses: list[float]
    axes: dict[str, list[float]]
    switches: list[int]
    bag_sizes: list[int]
    recovery: dict[str, Any] | None

    def total(self, axis: str) -> float:
        """Return what the whole run took on an axis."""
        return self.axes[axis][-1]

    @property
    def method(self) -> RunMethod:
        """What runs share that differ in seed and length alone."""
        return RunMethod(tuple(self.setting.items()), self.superposition)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.total("steps"))

    @property
    def final_loss(self) -> float:
        """Loss at the end of the run, when its learning rate has decayed."""
        return self.losses[-1]


def read_curves(paths: Sequence[Path]) -> list[RunCurve]:
    """Read run directories; runs of one name that differ in more than their seed get their folder's name in front.

    Raises:
        UserError: as :func:`read_curve`.
    """
    curves = [read_curve(path) for path in paths]
    kinds: dict[str, set[tuple[RunMethod, RunLength]]] = {}
    for curve in curves:
        kinds.setdefault(curve.name, set()).add((curve.method, curve.length))
    return [
        dataclasses.replace(curve, name=f"{path.resolve().parent.name}/{curve.name}")
        if len(kinds[curve.name]) > 1
        else curve
        for path, curve in zip(paths, curves, strict=True)
    ]


def read_curve(path: Path) -> RunCurve:
    """Read a run directory.

    Raises:
        UserError: if it holds no run that was evaluated, or its loss is no final one: the run has not ended, its
            learning rate has not decayed, or the loss is no number.
    """
    directory = RunDirectory(path)
    for file in (directory.metrics, directory.config):
        if not file.is_file():
            raise UserError(f"{path}: holds no {file.name}")
    lines = read_metrics(directory.metrics)
    steps = [line for line in lines if line["kind"] == "step"]
    valid = [line for line in lines if line["kind"] == "valid"]
    if not steps or not valid:
        raise UserError(f"{path}: has no logged step or no evaluation yet")
    config = load_config(directory.config)
    if valid[-1]["step"] < config.schedule.num_steps:
        raise UserError(
            f"{path}: was evaluated last after step {valid[-1]['step']} of {config.schedule.num_steps}; runs are "
            "compared at their ends"
        )
    if not is_decayed(config):
        raise UserError(
            f"{path}: --lr-decay-iters {config.optimizer.lr_decay_iters} is more than its {config.schedule.num_steps} "
            "steps; runs are compared where their learning rate has decayed"
        )
    if not math.isfinite(valid[-1]["valid_loss"]):
        raise UserError(f"{path}: ended with a validation loss of {valid[-1]['valid_loss']}")
    absent = [name for name in AXES[1:] if name not in valid[-1]]
    if absent:
        raise UserError(f"{path}: has no {absent[0]} in its metrics; another version of this program wrote them")
    changes = [(a, b) for a, b in itertools.pairwise(steps) if a["phase"] != b["phase"]]
    return RunCurve(
        name=path.name,
        seed=config.training.seed,
        setting=_setting(config, steps[-1]["positions"] / steps[-1]["step"]),
        superposition=_superposition(config),
        length=_length(config),
        losses=[line["valid_loss"] for line in valid],
        axes={axis: [line["step" if axis == "steps" else axis] for line in valid] for axis in AXES},
        switches=[before["step"] for before, _ in changes],
        bag_sizes=[steps[0]["bag_size"], *(after["bag_size"] for _, after in changes)],
        recovery=next((dict(line) for line in reversed(lines) if line["kind"] == "recovery"), None),
    )


def is_decayed(config: RunConfig) -> bool:
    """Return whether a run's learning rate has decayed when it ends, or never does."""
    optimizer = config.optimizer
    return optimizer.lr_decay_style == "constant" or (optimizer.lr_decay_iters or 0) <= config.schedule.num_steps


def _setting(config: RunConfig, positions_per_step: float) -> dict[str, Any]:
    """Return what runs share that differ in superposition, seed and length alone: flags with their values."""
    flags = {
        f"--{setting.name.replace('_', '-')}": _identity(value, effect)
        for section in dataclasses.fields(RunConfig)
        if section.name != "superposition" and dataclasses.is_dataclass(getattr(config, section.name))
        for setting in dataclasses.fields(getattr(config, section.name))
        if (effect := effect_of(RunConfig, f"{section.name}.{setting.name}")).is_compared
        for value in (getattr(getattr(config, section.name), setting.name),)
    }
    others = {f"--{name.replace('_', '-')}": value for name, value in config.megatron_lm.items()}
    return {"positions per step": positions_per_step, "--finetune": config.checkpoint.finetune, **flags, **others}


def _identity(value: Any, effect: Effect) -> Any:
    """Return what a value is compared by: files by their names, for a corpus may lie under another mount elsewhere."""
    if effect != TEXT or not isinstance(value, str | tuple):
        return value
    return Path(value).name if isinstance(value, str) else tuple(Path(part).name for part in value)


def _superposition(config: RunConfig) -> Superposition:
    """Return how a run superposes; what only the loss of bags depends on is left out where there are no bags."""
    total, settings = config.schedule.num_steps, config.superposition
    phases = tuple(
        (phase.bag_size, phase.reads_bags, round(phase.num_steps / total, 2)) for phase in config.schedule.phases
    )
    if all(phase.bag_size == 1 for phase in config.schedule.phases):
        return Superposition(phases)
    return Superposition(phases, settings.loss_weights, settings.tst_objective, settings.tst_reinitialize_at_switch)


def _length(config: RunConfig) -> RunLength:
    """Return all that is counted in steps."""
    optimizer = config.optimizer
    return RunLength(
        tuple(phase.num_steps for phase in config.schedule.phases),
        optimizer.lr_warmup_iters,
        optimizer.lr_decay_iters,
        optimizer.lr_wsd_decay_iters,
    )
