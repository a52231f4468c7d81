"""Compare finished runs by what they wrote into ``metrics.jsonl``.

A run's final loss is comparable because its own learning rate has decayed; the point at which a curve crosses another
run's final loss is not. So a speed-up at equal loss is read off from runs of different lengths, as the paper does.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.config import UserError
from megatron_tst.telemetry.metrics import read_metrics
from megatron_tst.telemetry.run_directory import RunDirectory


@dataclass(frozen=True)
class RunCurve:
    """The course of one run.

    Attributes:
        name: of the run directory.
        valid: ``(step, next-token loss in nats)`` of each evaluation.
        axes: where each evaluation lies on other axes: data tokens, positions and hours of training.
        train: ``(step, loss in nats, is next-token)`` of each logged step.
        switches: steps after which the bag size changes.
        bag_sizes: of the phases, in order.
        data_tokens: read in all.
        positions: computed in all.
    """

    name: str
    valid: list[tuple[int, float]]
    axes: dict[str, list[float]]
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

    @property
    def hours(self) -> float:
        """Time that training took, evaluations and saves left out."""
        return self.axes["hours"][-1]

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
    axes = {axis: [line[axis] for line in lines if "valid_loss" in line] for axis in ("data_tokens", "positions")}
    axes["hours"] = list(_hours(lines))
    changes = [(a, b) for a, b in itertools.pairwise(steps) if a["phase"] != b["phase"]]
    return RunCurve(
        name=path.name,
        valid=valid,
        axes=axes,
        train=[(line["step"], line["loss"], line["loss_kind"] == "ce") for line in steps],
        switches=[before["step"] for before, _ in changes],
        bag_sizes=[steps[0]["bag_size"], *(after["bag_size"] for _, after in changes)],
        data_tokens=steps[-1]["data_tokens"],
        positions=steps[-1]["positions"],
    )


def _hours(lines: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Yield for each evaluation the hours of training before it."""
    hours, last_step = 0.0, 0
    for line in lines:
        if "loss" in line:
            hours += (line["step"] - last_step) * line["step_time_s"] / 3600
            last_step = line["step"]
        elif "valid_loss" in line:
            yield hours


@dataclass(frozen=True)
class Standing:
    """How a run did against the baseline.

    Attributes:
        curve: the run.
        difference: its final loss less the baseline's, nats per token.
        steps: its steps over the baseline's.
        data_tokens: its data tokens over the baseline's.
        first_reached: the first evaluated step at which it was at the baseline's final loss, or None.
    """

    curve: RunCurve
    difference: float
    steps: float
    data_tokens: float
    first_reached: int | None


def compare(baseline: RunCurve, others: Sequence[RunCurve]) -> list[Standing]:
    """Hold runs against a baseline, in their order."""
    return [
        Standing(
            curve=curve,
            difference=curve.final_loss - baseline.final_loss,
            steps=curve.num_steps / baseline.num_steps,
            data_tokens=curve.data_tokens / baseline.data_tokens,
            first_reached=curve.first_step_at(baseline.final_loss),
        )
        for curve in others
    ]


def speed_up_at_equal_loss(standings: Sequence[Standing]) -> tuple[float, float | None] | None:
    """Return the speed-up that the runs show, each at the end of its own decay: at least, and less than.

    Returns:
        The baseline's steps over those of the shortest run that ends no higher than it, and over those of the longest
        run shorter than that one, which ends above (None without one); None if no run ends as low.
    """
    reaching = [standing.steps for standing in standings if standing.difference <= 0]
    if not reaching:
        return None
    shortest = min(reaching)
    missing = [standing.steps for standing in standings if standing.difference > 0 and standing.steps < shortest]
    return 1 / shortest, (1 / max(missing) if missing else None)
