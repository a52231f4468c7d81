"""Metrics of a run, one JSON object per line in ``metrics.jsonl``."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class StepMetrics:
    """One logged optimizer step.

    Attributes:
        step: 1-based, after the update.
        phase: 0-based.
        bag_size: data tokens per position of the phase.
        loss_kind: ``mce`` or ``mce_alt`` with bags, ``ce`` without; nats per position.
        loss: of this step's global batch.
        lr: learning rate of this step.
        grad_norm: global gradient norm before clipping.
        data_tokens: read since the start of the run.
        positions: computed since the start of the run.
        step_time_s: mean seconds per step since the line before.
        data_tokens_per_s: over the same steps, all ranks.
        positions_per_s: over the same steps, all ranks.
        tflops_per_gpu: model FLOPs per second and rank, in 1e12.
        mfu: the share of the card's bfloat16 peak that these are; null where the peak is not known.
        data_time_s: mean seconds per step that the main rank waited for text.
        forward_backward_time_s: mean seconds per step in forward and backward passes, pipeline bubbles included.
        optimizer_time_s: mean seconds per step in gradient norm and update.
        data_epochs: how often the most-read share of the phase's documents has been read.
        memory_gib: highest memory of the main rank so far: allocated on the card, or resident without one.
    """

    step: int
    phase: int
    bag_size: int
    loss_kind: Literal["mce", "mce_alt", "ce"]
    loss: float
    lr: float
    grad_norm: float
    data_tokens: int
    positions: int
    step_time_s: float
    data_tokens_per_s: float
    positions_per_s: float
    tflops_per_gpu: float
    mfu: float | None
    data_time_s: float
    forward_backward_time_s: float
    optimizer_time_s: float
    data_epochs: float
    memory_gib: float


@dataclass(frozen=True)
class ValidMetrics:
    """One evaluation.

    Attributes:
        step: 1-based number of updates done.
        valid_loss: next-token cross-entropy with bag size 1, nats per token, in every phase.
        data_tokens: read for training since the start of the run.
        positions: computed in training since the start of the run.
    """

    step: int
    valid_loss: float
    data_tokens: int
    positions: int


@dataclass(frozen=True)
class ExpertMetrics:
    """How evenly the router spread positions over experts, since the line before.

    Attributes:
        step: 1-based, after the update.
        expert_load_max: per layer, positions of the busiest expert over the mean; 1 is balanced.
        expert_load_min: per layer, positions of the idlest expert over the mean.
    """

    step: int
    expert_load_max: list[float]
    expert_load_min: list[float]


@dataclass(frozen=True)
class SkippedMetrics:
    """One step that was not applied, because its loss or gradient was not finite.

    Attributes:
        step: 1-based.
        phase: 0-based.
        bag_size: data tokens per position of the phase.
        first_sample: of the phase, that the step read.
        last_sample: of the phase, that the step read.
        skipped_loss: as a word: nan, inf or a number.
        skipped_grad_norm: likewise.
    """

    step: int
    phase: int
    bag_size: int
    first_sample: int
    last_sample: int
    skipped_loss: str
    skipped_grad_norm: str


class MetricsFile:
    """Appends metrics to ``metrics.jsonl``; a line is on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending."""
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics | ValidMetrics | ExpertMetrics | SkippedMetrics) -> None:
        """Append one line."""
        self._file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of all steps after ``last_step``; the file is whole at any time."""
    aside = path.with_name(f".partial-{path.name}")
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Read all lines of a ``metrics.jsonl``; a last line cut off by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
