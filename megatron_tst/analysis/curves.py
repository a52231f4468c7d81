"""Reads the loss curve of a run from its directory."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tst.config import RunConfig, UserError, load_config
from megatron_tst.config.effects import effect_of
from megatron_tst.telemetry.metrics import read_metrics
from megatron_tst.telemetry.run_directory import RunDirectory

# What text.json identifies, by flag.
_RECORDED = {
    "--data-path": "corpora",
    "--train-data-path": "corpora",
    "--valid-data-path": "corpora",
    "--tokenizer-model": "tokenizer",
}
AXES = ("steps", "data_tokens", "flops", "gpu_hours")


@dataclass(frozen=True)
class Superposition:
    """The superposition settings of a run; a run without bags has only phases.

    Attributes:
        phases: bag size, whether bags are read, and fraction of the steps of each phase.
        bag_weights: bag weights of the loss.
        objective: objective of the phases with bags.
        reinitializes: whether embedding and output layer are re-initialized at the start of the recovery.
    """

    phases: tuple[tuple[int, bool, float], ...]
    bag_weights: str | None = None
    objective: str | None = None
    reinitializes: bool | None = None


@dataclass(frozen=True)
class RunLength:
    """All settings that are counted in steps.

    Attributes:
        phases: number of steps of each phase.
        warmup: number of warm-up steps of the learning rate.
        decay_end: step at which the decay of the learning rate ends; None means the end of the run.
        wsd_decay: number of steps of the final decay, with WSD.
    """

    phases: tuple[int, ...]
    warmup: int
    decay_end: int | None
    wsd_decay: int | None


@dataclass(frozen=True)
class RunMethod:
    """All settings of runs except seed and length.

    Attributes:
        setting: flags with their values.
        superposition: superposition settings.
    """

    setting: tuple[tuple[str, Any], ...]
    superposition: Superposition


@dataclass(frozen=True)
class RunCurve:
    """The loss curve of one run.

    Attributes:
        name: name of the run directory.
        seed: seed of the run.
        setting: all settings except superposition, seed and length, as flags with their values.
        superposition: superposition settings.
        length: settings that are counted in steps.
        losses: next-token validation loss of each evaluation, in nats per token.
        axes: value of each evaluation on each of :data:`AXES`.
        switches: steps after which the bag size changes.
        bag_sizes: bag sizes of the phases, in order.
        recovery: recovery line of the last switch, with ``spike`` in nats and ``recovery_steps``, or None.
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
        """Return the total of the whole run on an axis."""
        return self.axes[axis][-1]

    @property
    def method(self) -> RunMethod:
        """All settings except seed and length."""
        return RunMethod(tuple(self.setting.items()), self.superposition)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return int(self.total("steps"))

    @property
    def final_loss(self) -> float:
        """Validation loss at the end of the run, after its learning rate has decayed."""
        return self.losses[-1]


def read_curves(paths: Sequence[Path]) -> list[RunCurve]:
    """Read run directories; runs with equal names but different settings are prefixed with their folder's name.

    Raises:
        UserError: see :func:`read_curve`.
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
        UserError: if the directory holds no evaluated run, the run has not finished, its learning rate has not
            decayed, or its final loss is NaN or infinite.
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
            f"{path}: was last evaluated after step {valid[-1]['step']} of {config.schedule.num_steps}; only the ends "
            "of runs are compared"
        )
    if not is_decayed(config):
        raise UserError(
            f"{path}: --lr-decay-iters {config.optimizer.lr_decay_iters} is more than its {config.schedule.num_steps} "
            "steps; runs are compared only after their learning rate has decayed"
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
        setting=_setting(config, steps[-1]["positions"] / steps[-1]["step"], _read_text(directory)),
        superposition=_superposition(config),
        length=_length(config),
        losses=[line["valid_loss"] for line in valid],
        axes={axis: [line["step" if axis == "steps" else axis] for line in valid] for axis in AXES},
        switches=[before["step"] for before, _ in changes],
        bag_sizes=[steps[0]["bag_size"], *(after["bag_size"] for _, after in changes)],
        recovery=next((dict(line) for line in reversed(lines) if line["kind"] == "recovery"), None),
    )


def _read_text(directory: RunDirectory) -> dict[str, str]:
    try:
        return dict(json.loads(directory.text.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory.text}: cannot be read: {error}") from error


def is_decayed(config: RunConfig) -> bool:
    """Return whether a run's learning rate is constant or has decayed at the end of the run."""
    optimizer = config.optimizer
    return optimizer.lr_decay_style == "constant" or (optimizer.lr_decay_iters or 0) <= config.schedule.num_steps


@dataclass(frozen=True)
class TextName:
    """The name of a corpus or tokenizer, equal to another name of the same content.

    Attributes:
        content: identifies the content.
        name: value of the setting.
    """

    content: str
    name: Any = field(compare=False)

    def __str__(self) -> str:
        """Return the name."""
        return str(self.name)


def _setting(config: RunConfig, positions_per_step: float, text: Mapping[str, str]) -> dict[str, Any]:
    """Return all settings except superposition, seed and length, as flags with their values.

    Args:
        config: settings of the run.
        positions_per_step: number of positions per step, over all ranks.
        text: what identifies its corpora and tokenizer; empty for a run that did not record it.
    """
    found: dict[str, Any] = {"positions per step": positions_per_step, "--finetune": config.checkpoint.finetune}
    for section in dataclasses.fields(RunConfig):
        settings: Any = getattr(config, section.name)
        if section.name == "superposition" or not dataclasses.is_dataclass(settings):
            continue
        for setting in dataclasses.fields(settings):
            if effect_of(RunConfig, f"{section.name}.{setting.name}").is_compared:
                found[f"--{setting.name.replace('_', '-')}"] = getattr(settings, setting.name)
    found |= {f"--{name.replace('_', '-')}": value for name, value in config.megatron_lm.items()}
    # The same corpus may lie elsewhere on another machine, and another one under the same name.
    for flag, kind in _RECORDED.items():
        if found[flag] and kind in text:
            found[flag] = TextName(text[kind], found[flag])
    return found


def _superposition(config: RunConfig) -> Superposition:
    """Return the superposition settings of a run; without bags, the settings of their loss are omitted."""
    total, settings = config.schedule.num_steps, config.superposition
    phases = tuple(
        (phase.bag_size, phase.reads_bags, round(phase.num_steps / total, 2)) for phase in config.schedule.phases
    )
    if all(phase.bag_size == 1 for phase in config.schedule.phases):
        return Superposition(phases)
    return Superposition(phases, settings.loss_weights, settings.tst_objective, settings.tst_reinitialize_at_switch)


def _length(config: RunConfig) -> RunLength:
    """Return all settings that are counted in steps."""
    optimizer = config.optimizer
    return RunLength(
        tuple(phase.num_steps for phase in config.schedule.phases),
        optimizer.lr_warmup_iters,
        optimizer.lr_decay_iters,
        optimizer.lr_wsd_decay_iters,
    )
