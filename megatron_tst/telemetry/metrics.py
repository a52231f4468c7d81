"""Metrics of a run, one JSON object per line in ``metrics.jsonl``."""

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

# Names the fields of a line that hold a number that is not finite, which JSON cannot write.
NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class About:
    """What a metric is.

    Attributes:
        unit: of the number; empty for a pure number, or none.
        meaning: what it tells.
        formula: that it follows from, where the name does not say it.
    """

    unit: str
    meaning: str
    formula: str = ""


@dataclass(frozen=True)
class StepMetrics:
    """One logged optimizer step. Times and speeds are means over the steps since the line before."""

    kind: ClassVar[str] = "step"
    step: Annotated[int, About("steps", "1-based, after the update")]
    phase: Annotated[int, About("", "0-based")]
    bag_size: Annotated[int, About("data tokens", "s of the phase: data tokens per bag")]
    loss_kind: Annotated[Literal["mce", "mce_alt", "ce"], About("", "`mce` or `mce_alt` with bags, `ce` without")]
    loss: Annotated[
        float,
        About(
            "nats per token",
            "of this step's global batch; `mce_alt`: per bag",
            "sum of row losses / sum of row weights",
        ),
    ]
    lr: Annotated[float, About("", "highest learning rate of this step")]
    lr_by_group: Annotated[
        dict[str, float],
        About("", "learning rate of each group of parameters, `decay` and `no_decay` by their weight decay"),
    ]
    grad_norm: Annotated[float, About("", "global norm of the gradient before clipping", "sqrt(sum of squares)")]
    data_tokens: Annotated[
        int,
        About(
            "data tokens",
            "read since the start",
            "sum over phases: steps x batch x L x s (x 1 where tokens are read, not bags)",
        ),
    ]
    positions: Annotated[int, About("positions", "computed since the start", "steps x batch x L")]
    flops: Annotated[float, About("FLOP", "model FLOPs since the start", "steps x FLOPs per step")]
    gpu_hours: Annotated[
        float,
        About("h", "of all ranks since the start, over all starts of the run", "sum of step_time_s x ranks / 3600"),
    ]
    step_time_s: Annotated[float, About("s", "of a step; evaluations and saves are left out", "seconds / steps")]
    data_tokens_per_s: Annotated[float, About("data tokens/s", "over all ranks", "data tokens / seconds")]
    positions_per_s: Annotated[float, About("positions/s", "over all ranks", "positions / seconds")]
    tflops_per_gpu: Annotated[
        float, About("1e12 FLOP/s", "of one rank", "steps x FLOPs per step / (seconds x ranks x 1e12)")
    ]
    mfu: Annotated[
        float | None, About("", "null where the card's peak is not known", "tflops_per_gpu / dense bfloat16 peak")
    ]
    data_time_s: Annotated[
        float | None,
        About("s", "of a step: the main rank waits for text; null with Megatron-LM's trainer, like the three below"),
    ]
    forward_backward_time_s: Annotated[
        float | None,
        About("s", "of a step: passes, with the collectives inside layers, the pipeline's sends and its bubbles"),
    ]
    optimizer_time_s: Annotated[float | None, About("s", "of a step: gradient norm and update")]
    communication_time_s: Annotated[
        float | None, About("s", "of a step: reducing gradients and gathering parameters, as far as nothing hides it")
    ]
    data_epochs: Annotated[
        float,
        About(
            "",
            "how often the most-read share of the phase's documents has been read",
            "samples read / samples of the share",
        ),
    ]
    memory_gib: Annotated[
        float, About("GiB", "highest of the main rank so far: allocated on the card, or resident without one")
    ]


@dataclass(frozen=True)
class ValidMetrics:
    """One evaluation."""

    kind: ClassVar[str] = "valid"
    step: Annotated[int, About("steps", "updates done")]
    valid_loss: Annotated[float, About("nats per token", "next-token cross-entropy with bag size 1, in every phase")]
    bits_per_byte: Annotated[
        float | None,
        About(
            "bits per byte",
            "the same per byte of text, ends of documents in the loss alone; null where a token's bytes are not known",
            "valid_loss x targets / (bytes of the targets x ln 2)",
        ),
    ]
    data_tokens: Annotated[int, About("data tokens", "read for training since the start")]
    positions: Annotated[int, About("positions", "computed in training since the start")]
    flops: Annotated[float, About("FLOP", "model FLOPs of training since the start")]
    gpu_hours: Annotated[float, About("h", "of all ranks in training since the start")]


@dataclass(frozen=True)
class ExpertMetrics:
    """How the router spread positions over experts, since the line before."""

    kind: ClassVar[str] = "experts"
    step: Annotated[int, About("steps", "1-based, after the update")]
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
            "choices that a full expert did not take / all choices",
        ),
    ]


@dataclass(frozen=True)
class SwitchMetrics:
    """The first step of a phase after another: the bag size has changed."""

    kind: ClassVar[str] = "switch"
    step: Annotated[int, About("steps", "1-based, after the update")]
    switched_after_step: Annotated[int, About("steps", "last step of the phase before")]
    switched_from_bag_size: Annotated[int, About("data tokens", "s of the phase before")]
    switched_to_bag_size: Annotated[int, About("data tokens", "s of this phase")]
    loss_before_switch: Annotated[float, About("nats per token", "mean of the last ten steps of the phase before")]
    loss_after_switch: Annotated[float, About("nats per token", "of this step")]


@dataclass(frozen=True)
class RecoveryMetrics:
    """How a switch was overcome: the loss is back at its level before, or the phase ends without that."""

    kind: ClassVar[str] = "recovery"
    step: Annotated[int, About("steps", "1-based, after the update")]
    switched_after_step: Annotated[int, About("steps", "last step of the phase before")]
    spike: Annotated[
        float, About("nats per token", "how far the loss rose", "highest loss of a step since - loss_before_switch")
    ]
    recovery_steps: Annotated[
        int | None,
        About("steps", "from the switch until the mean loss of ten steps (at first, of fewer) is back; null if never"),
    ]


@dataclass(frozen=True)
class SkippedMetrics:
    """One step that was not applied, because its loss or gradient was not finite."""

    kind: ClassVar[str] = "skipped"
    step: Annotated[int, About("steps", "1-based")]
    phase: Annotated[int, About("", "0-based")]
    bag_size: Annotated[int, About("data tokens", "s of the phase")]
    first_sample: Annotated[int, About("", "of the phase, that the step read")]
    last_sample: Annotated[int, About("", "of the phase, that the step read")]
    skipped_loss: Annotated[str, About("nats per token", "as a word: nan, inf or a number")]
    skipped_grad_norm: Annotated[str, About("", "likewise")]


KINDS = (StepMetrics, ValidMetrics, ExpertMetrics, SwitchMetrics, RecoveryMetrics, SkippedMetrics)
Metrics: TypeAlias = StepMetrics | ValidMetrics | ExpertMetrics | SwitchMetrics | RecoveryMetrics | SkippedMetrics


class MetricsFile:
    """Appends metrics to ``metrics.jsonl``; a line is handed to the disk whole, or not at all."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending."""
        # Without a buffer, which would keep a line that the disk refuses and fail again when it is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, metrics: Metrics) -> None:
        """Append one line.

        Raises:
            OSError: if the disk refuses it; the file ends with the line before.
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
    """Drop the lines of all steps after ``last_step``; the file is whole at any time."""
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    write_whole(path, "".join(map(_write_line, kept)))


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Read all lines of a ``metrics.jsonl``, numbers that are not finite too; a last line cut off is left out.

    Each line has its ``kind``: ``step``, ``valid``, ``experts``, ``switch``, ``recovery`` or ``skipped``.

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
    """Write a line, each number that is not finite as null and, under :data:`NOT_FINITE`, as a word."""
    words = {name: _words(value) for name, value in metrics.items() if not _is_finite(value)}
    return write_json({**metrics, NOT_FINITE: words} if words else metrics) + "\n"


def _read_line(line: str) -> dict[str, Any]:
    metrics = dict(json.loads(line).items())
    words = metrics.pop(NOT_FINITE, {})
    kind = metrics.pop("kind", None) or _infer_kind(metrics)
    return {"kind": kind, **metrics, **{name: _numbers(value) for name, value in words.items()}}


def _infer_kind(metrics: Mapping[str, Any]) -> str:
    """Return the kind of a line from before version 0.2, which did not write it."""
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
