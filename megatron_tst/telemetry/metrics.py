"""The metrics of a run, written as one JSON object per line of ``metrics.jsonl``."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from megatron_tst.config import UserError, write_json
from megatron_tst.telemetry.outputs import write_whole

# Field that holds the NaN and infinite values of a line, which JSON cannot represent.
NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class About:
    """The description of a metric.

    Attributes:
        unit: unit of the number; empty for a pure number.
        meaning: meaning of the metric.
        formula: formula of the metric, if its name does not explain it.
    """

    unit: str
    meaning: str
    formula: str = ""


@dataclass(frozen=True)
class StepMetrics:
    """One logged optimizer step. Times and rates are means over the steps since the previous `step` line."""

    kind: ClassVar[str] = "step"
    step: Annotated[int, About("steps", "1-based number of the step, after the update")]
    phase: Annotated[int, About("", "0-based index of the phase")]
    bag_size: Annotated[int, About("data tokens", "s of the phase: data tokens per bag")]
    loss_kind: Annotated[
        Literal["mce", "mce_alt", "ce"], About("", "`mce` or `mce_alt` with bags, `ce` with bag size 1")
    ]
    loss: Annotated[
        float,
        About(
            "nats per token",
            "loss of this step's global batch; with `mce_alt` in nats per bag",
            "sum of row losses / sum of row weights",
        ),
    ]
    lr: Annotated[float, About("", "highest learning rate of the parameter groups in this step")]
    lr_by_group: Annotated[
        dict[str, float],
        About("", "learning rate of each parameter group: `decay` with and `no_decay` without weight decay"),
    ]
    grad_norm: Annotated[float, About("", "global norm of the gradient before clipping", "sqrt(sum of squares)")]
    data_tokens: Annotated[
        int,
        About(
            "data tokens",
            "data tokens read since the start",
            "sum over phases: steps x batch x L x s (x 1 in phases that read single tokens)",
        ),
    ]
    positions: Annotated[int, About("positions", "positions computed since the start", "steps x batch x L")]
    flops: Annotated[float, About("FLOP", "model FLOPs since the start", "steps x FLOPs per step")]
    gpu_hours: Annotated[
        float,
        About("h", "training time of all ranks, over all starts of the run", "sum of step_time_s x ranks / 3600"),
    ]
    step_time_s: Annotated[float, About("s", "time per step, without evaluations and saves", "seconds / steps")]
    data_tokens_per_s: Annotated[float, About("data tokens/s", "rate over all ranks", "data tokens / seconds")]
    positions_per_s: Annotated[float, About("positions/s", "rate over all ranks", "positions / seconds")]
    tflops_per_gpu: Annotated[
        float, About("1e12 FLOP/s", "rate of one rank", "steps x FLOPs per step / (seconds x ranks x 1e12)")
    ]
    mfu: Annotated[
        float | None,
        About(
            "",
            "model FLOPs utilization; null if the GPU's peak is unknown",
            "tflops_per_gpu / dense bfloat16 peak",
        ),
    ]
    data_time_s: Annotated[
        float | None,
        About(
            "s",
            "time per step in which the main rank waits for data; null with Megatron-LM's trainer, as the next three",
        ),
    ]
    forward_backward_time_s: Annotated[
        float | None,
        About(
            "s",
            "time per step of the forward and backward passes, including collectives inside layers, pipeline sends "
            "and pipeline bubbles",
        ),
    ]
    optimizer_time_s: Annotated[float | None, About("s", "time per step of the gradient norm and the update")]
    communication_time_s: Annotated[
        float | None,
        About(
            "s",
            "time per step of gradient reductions and parameter gathers that do not overlap with computation",
        ),
    ]
    data_epochs: Annotated[
        float,
        About(
            "",
            "epochs of the phase's documents; with several datasets, those of the most-read one",
            "samples read / samples in one epoch",
        ),
    ]
    memory_gib: Annotated[
        float, About("GiB", "peak memory of the main rank so far: allocated GPU memory, or resident memory without GPU")
    ]


@dataclass(frozen=True)
class ValidMetrics:
    """One evaluation."""

    kind: ClassVar[str] = "valid"
    step: Annotated[int, About("steps", "number of completed steps")]
    valid_loss: Annotated[float, About("nats per token", "next-token cross-entropy with bag size 1, in every phase")]
    bits_per_byte: Annotated[
        float | None,
        About(
            "bits per byte",
            "the loss per byte of text, where end-of-document tokens count zero bytes; null if token bytes are unknown",
            "valid_loss x targets / (bytes of the targets x ln 2)",
        ),
    ]
    data_tokens: Annotated[int, About("data tokens", "data tokens read for training since the start")]
    positions: Annotated[int, About("positions", "positions computed in training since the start")]
    flops: Annotated[float, About("FLOP", "model FLOPs of training since the start")]
    gpu_hours: Annotated[float, About("h", "training time of all ranks since the start")]


@dataclass(frozen=True)
class ExpertMetrics:
    """Load of the experts since the previous `experts` line."""

    kind: ClassVar[str] = "experts"
    step: Annotated[int, About("steps", "1-based number of the step, after the update")]
    expert_load_max: Annotated[
        list[float], About("", "per layer; 1 is balanced", "positions of the busiest expert / mean")
    ]
    expert_load_min: Annotated[
        list[float], About("", "per layer; 1 is balanced", "positions of the idlest expert / mean")
    ]
    dropped_share: Annotated[
        list[float],
        About(
            "",
            "per layer; 0 without --moe-expert-capacity-factor",
            "choices that a full expert dropped / all choices",
        ),
    ]


@dataclass(frozen=True)
class SwitchMetrics:
    """The first step after a change of the bag size."""

    kind: ClassVar[str] = "switch"
    step: Annotated[int, About("steps", "1-based number of the step, after the update")]
    switched_after_step: Annotated[int, About("steps", "last step of the previous phase")]
    switched_from_bag_size: Annotated[int, About("data tokens", "s of the previous phase")]
    switched_to_bag_size: Annotated[int, About("data tokens", "s of this phase")]
    loss_before_switch: Annotated[
        float, About("nats per token", "mean loss of the last ten steps of the previous phase")
    ]
    loss_after_switch: Annotated[float, About("nats per token", "loss of this step")]


@dataclass(frozen=True)
class RecoveryMetrics:
    """End of the recovery from a switch: the loss is back at its previous level, or the phase ends before that."""

    kind: ClassVar[str] = "recovery"
    step: Annotated[int, About("steps", "1-based number of the step, after the update")]
    switched_after_step: Annotated[int, About("steps", "last step of the previous phase")]
    spike: Annotated[
        float,
        About(
            "nats per token",
            "rise of the loss at the switch",
            "highest loss of a step since the switch - loss_before_switch",
        ),
    ]
    recovery_steps: Annotated[
        int | None,
        About(
            "steps",
            "steps from the switch until the mean loss of the last ten steps (of fewer directly after the switch) is "
            "back; null if it never is",
        ),
    ]


@dataclass(frozen=True)
class SkippedMetrics:
    """One step that was not applied because its loss or gradient was not finite."""

    kind: ClassVar[str] = "skipped"
    step: Annotated[int, About("steps", "1-based number of the step")]
    phase: Annotated[int, About("", "0-based index of the phase")]
    bag_size: Annotated[int, About("data tokens", "s of the phase")]
    first_sample: Annotated[int, About("", "first sample of the phase that the step read")]
    last_sample: Annotated[int, About("", "last sample of the phase that the step read")]
    skipped_loss: Annotated[str, About("nats per token", "loss as a string: nan, inf or a number")]
    skipped_grad_norm: Annotated[str, About("", "gradient norm as a string: nan, inf or a number")]


KINDS = (StepMetrics, ValidMetrics, ExpertMetrics, SwitchMetrics, RecoveryMetrics, SkippedMetrics)
Metrics: TypeAlias = StepMetrics | ValidMetrics | ExpertMetrics | SwitchMetrics | RecoveryMetrics | SkippedMetrics


class MetricsFile:
    """Appends metrics to ``metrics.jsonl``; a line is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending."""
        # A buffer would keep a line that could not be written, and closing the file would fail again.
        self._file = path.open("ab", buffering=0)

    def write(self, metrics: Metrics) -> None:
        """Append one line.

        Raises:
            OSError: if the line cannot be written; the file then ends with the previous line.
        """
        left = _write_line({"kind": metrics.kind, **dataclasses.asdict(metrics)}).encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(size)
            raise

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of all steps after ``last_step``; the file is replaced atomically."""
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    write_whole(path, "".join(map(_write_line, kept)))


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Read all lines of a ``metrics.jsonl``, including NaN and infinite values; an incomplete last line is dropped.

    Each line has a ``kind``: ``step``, ``valid``, ``experts``, ``switch``, ``recovery`` or ``skipped``.

    Raises:
        UserError: if another line is damaged.
    """
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_read_line(line))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is damaged: {error}") from error
    return found


def _write_line(metrics: Mapping[str, Any]) -> str:
    """Return a line, with each NaN or infinite number as null and, under :data:`NOT_FINITE`, as a string."""
    words = {name: _words(value) for name, value in metrics.items() if not _is_finite(value)}
    return write_json({**metrics, NOT_FINITE: words} if words else metrics) + "\n"


def _read_line(line: str) -> dict[str, Any]:
    metrics = dict(json.loads(line).items())
    words = metrics.pop(NOT_FINITE, {})
    kind = metrics.pop("kind", None) or _infer_kind(metrics)
    return {"kind": kind, **metrics, **{name: _numbers(value) for name, value in words.items()}}


def _infer_kind(metrics: Mapping[str, Any]) -> str:
    """Return the kind of a line that was written before version 0.2, which did not record it."""
    for kind, field in (
        ("valid", "valid_loss"),
        ("experts", "expert_load_max"),
        ("switch", "switched_to_bag_size"),
        ("recovery", "recovery_steps"),
        ("skipped", "skipped_loss"),
    ):
        if field in metrics:
            return kind
    return "step"


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _words(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _words(item) for name, item in value.items()}
    return [_words(item) for item in value] if isinstance(value, list) else str(value)


def _numbers(words: Any) -> Any:
    if isinstance(words, dict):
        return {name: _numbers(item) for name, item in words.items()}
    return [_numbers(item) for item in words] if isinstance(words, list) else float(words)
