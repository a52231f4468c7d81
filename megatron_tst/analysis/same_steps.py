"""Compares the figures of every step of two runs, to check whether both compute the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.config import UserError
from megatron_tst.telemetry import read_metrics

_FIGURES = {"step": ("loss", "grad_norm", "lr"), "valid": ("valid_loss",)}


@dataclass(frozen=True)
class Step:
    """One figure of one step.

    Attributes:
        step: number of completed optimizer steps.
        name: name of the figure, as in ``metrics.jsonl``.
        value: value of the figure.
    """

    step: int
    name: str
    value: float


def read_steps(path: Path) -> list[Step]:
    """Return losses, gradient norms, learning rates and validation losses of a run, in the order of its steps.

    Raises:
        UserError: if the run has not logged a step.
    """
    lines = read_metrics(path) if path.is_file() else []
    found = [
        Step(line["step"], name, line[name])
        for kind, names in _FIGURES.items()
        for line in lines
        if line["kind"] == kind
        for name in names
    ]
    if not found:
        raise UserError(f"{path}: has no logged step")
    return sorted(found, key=lambda figure: figure.step)


def differing(one: Sequence[Step], other: Sequence[Step]) -> list[int]:
    """Return the indices at which two runs differ; a figure that only one run has counts as different."""
    common = min(len(one), len(other))
    unequal = [place for place in range(common) if one[place] != other[place]]
    return [*unequal, *range(common, max(len(one), len(other)))]


def largest_difference(one: Sequence[Step], other: Sequence[Step]) -> float:
    """Return the largest relative difference of a figure that both runs have."""
    pairs = [(a.value, b.value) for a, b in zip(one, other, strict=False) if a.value != b.value]
    return max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs), default=0.0)
