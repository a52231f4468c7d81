"""Compare finished runs by what they wrote into ``metrics.jsonl``."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.config import UserError
from megatron_tst.telemetry.metrics import read_metrics
from megatron_tst.telemetry.run_directory import RunDirectory


@dataclass(frozen=True)
class RunCurve:
    """The course of one run.

    Attributes:
        name: of the run directory.
        valid: ``(step, next-token loss in nats)`` of each evaluation.
        train: ``(step, loss in nats, is next-token)`` of each logged step.
        switches: steps after which the bag size changes.
        bag_sizes: of the phases, in order.
        data_tokens: read in all.
        positions: computed in all.
    """

    name: str
    valid: list[tuple[int, float]]
    train: list[tuple[int, float, bool]]
    switches: list[int]
    bag_sizes: list[int]
    data_tokens: int
    positions: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.train[-1][0]

    @property
    def final_loss(self) -> float:
        """Next-token validation loss at the end, nats per token."""
        return self.valid[-1][1]

    def first_step_at(self, loss: float) -> int | None:
        """Return the first evaluated step whose validation loss is at most ``loss``, or None."""
        return next((step for step, value in self.valid if value <= loss), None)


def read_curve(path: Path) -> RunCurve:
    """Read a run directory.

    Raises:
        UserError: if it holds no run, or the run was not evaluated.
    """
    metrics = RunDirectory(path).metrics
    if not metrics.is_file():
        raise UserError(f"{path}: holds no metrics.jsonl")
    lines = read_metrics(metrics)
    steps = [line for line in lines if "loss" in line]
    valid = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    if not steps or not valid:
        raise UserError(f"{path}: has no logged step or no evaluation yet")
    changes = [(a, b) for a, b in itertools.pairwise(steps) if a["phase"] != b["phase"]]
    return RunCurve(
        name=path.name,
        valid=valid,
        train=[(line["step"], line["loss"], line["loss_kind"] == "ce") for line in steps],
        switches=[before["step"] for before, _ in changes],
        bag_sizes=[steps[0]["bag_size"], *(after["bag_size"] for _, after in changes)],
        data_tokens=steps[-1]["data_tokens"],
        positions=steps[-1]["positions"],
    )
