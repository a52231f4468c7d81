"""The course of a run, read from its directory."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.config import RunConfig, UserError, load_config
from megatron_tst.telemetry.metrics import read_metrics
from megatron_tst.telemetry.run_directory import RunDirectory

AXES = ("steps", "data_tokens", "flops", "gpu_hours")


@dataclass(frozen=True)
class RunCurve:
    """The course of one run.

    Attributes:
        name: of the run directory.
        seed: of the run.
        method: all settings that make it another kind of run: neither seed nor length.
        losses: next-token validation loss of each evaluation, nats per token.
        axes: where each evaluation lies on each of :data:`AXES`.
        switches: steps after which the bag size changes.
        bag_sizes: of the phases, in order.
        recovery: what was told of the last switch: ``spike`` in nats and ``recovery_steps``; None without one.
    """

    name: str
    seed: int
    method: str
    losses: list[float]
    axes: dict[str, list[float]]
    switches: list[int]
    bag_sizes: list[int]
    recovery: dict[str, Any] | None

    def total(self, axis: str) -> float:
        """Return what the whole run took on an axis."""
        return self.axes[axis][-1]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.total("steps"))

    @property
    def final_loss(self) -> float:
        """Loss at the end of the run, when its learning rate has decayed."""
        return self.losses[-1]


def read_curve(path: Path) -> RunCurve:
    """Read a run directory.

    Raises:
        UserError: if it holds no run that was evaluated, or the run has not ended: its loss is then not a final one.
    """
    directory = RunDirectory(path)
    for file in (directory.metrics, directory.config):
        if not file.is_file():
            raise UserError(f"{path}: holds no {file.name}")
    lines = read_metrics(directory.metrics)
    steps = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    if not steps or not valid:
        raise UserError(f"{path}: has no logged step or no evaluation yet")
    config = load_config(directory.config)
    if valid[-1]["step"] < config.schedule.num_steps:
        raise UserError(
            f"{path}: was evaluated last after step {valid[-1]['step']} of {config.schedule.num_steps}; runs are "
            "compared at their ends"
        )
    changes = [(a, b) for a, b in itertools.pairwise(steps) if a["phase"] != b["phase"]]
    return RunCurve(
        name=path.name,
        seed=config.training.seed,
        method=_method(config, steps[-1]["positions"] / steps[-1]["step"]),
        losses=[line["valid_loss"] for line in valid],
        axes={axis: [line["step" if axis == "steps" else axis] for line in valid] for axis in AXES},
        switches=[before["step"] for before, _ in changes],
        bag_sizes=[steps[0]["bag_size"], *(after["bag_size"] for _, after in changes)],
        recovery=next((dict(line) for line in reversed(lines) if "recovery_steps" in line), None),
    )


def _method(config: RunConfig, positions_per_step: float) -> str:
    """Return what runs share that differ in seed and length alone; phases count by their share of the steps."""
    optimizer, total = config.optimizer, config.schedule.num_steps
    phases = [(phase.bag_size, phase.reads_bags, round(phase.num_steps / total, 2)) for phase in config.schedule.phases]
    is_superposed = any(bag_size > 1 for bag_size, _, _ in phases)
    objective = (config.superposition.loss_weights, config.superposition.tst_objective) if is_superposed else None
    rates = (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style, optimizer.lr_wsd_decay_style)
    others = (optimizer.weight_decay, optimizer.adam_beta1, optimizer.adam_beta2, optimizer.clip_grad)
    return repr((config.model, phases, objective, rates, others, positions_per_step, config.training.bf16))
