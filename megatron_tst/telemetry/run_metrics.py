"""Pure functions that turn the results of steps and evaluations into metric lines, the same for both trainers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tst.distributed.device import peak_memory_bytes
from megatron_tst.shape.flops import peak_tflops
from megatron_tst.superposition import PhasePoint, Schedule
from megatron_tst.telemetry.metrics import SkippedMetrics, StepMetrics, ValidMetrics
from megatron_tst.telemetry.progress import short


@dataclass(frozen=True)
class StepTimes:
    """Times of the parts of one or several optimizer steps, in seconds.

    Attributes:
        forward_backward_s: time of the forward and backward passes.
        optimizer_s: time of the gradient norm and the update.
        communication_s: time of gradient reductions and parameter gathers that do not overlap with computation.
    """

    forward_backward_s: float = 0.0
    optimizer_s: float = 0.0
    communication_s: float = 0.0

    def __add__(self, other: "StepTimes") -> "StepTimes":
        """Return the sum, part by part."""
        return StepTimes(
            self.forward_backward_s + other.forward_backward_s,
            self.optimizer_s + other.optimizer_s,
            self.communication_s + other.communication_s,
        )


@dataclass(frozen=True)
class Interval:
    """The steps between two metric lines.

    Attributes:
        steps: number of optimizer steps.
        seconds: time of these steps, without evaluations and saves.
        data_s: time spent waiting for data; None if it is not measured.
        parts: times of the steps' parts; None if they are not measured.
    """

    steps: int
    seconds: float
    data_s: float | None = None
    parts: StepTimes | None = None


@dataclass(frozen=True)
class Totals:
    """Totals of a run since its start.

    Attributes:
        data_tokens: number of data tokens read.
        positions: number of positions computed.
        flops: number of model FLOPs.
    """

    data_tokens: int
    positions: int
    flops: float


@dataclass(frozen=True)
class RunFacts:
    """Constants of a run from which metrics are computed.

    Attributes:
        schedule: phases of the run.
        objective: objective of the loss while bags are predicted.
        positions_per_step: number of positions per step, over all ranks.
        flops_per_step: model FLOPs per step, over all ranks.
        epochs: number of epochs of its documents that each phase reads.
        world_size: number of ranks.
        device_name: name of the device.
    """

    schedule: Schedule
    objective: Literal["mce", "mce_alt"]
    positions_per_step: int
    flops_per_step: float
    epochs: tuple[float, ...]
    world_size: int
    device_name: str

    def totals(self, step: int) -> Totals:
        """Return the totals of the first ``step`` optimizer steps."""
        return Totals(
            data_tokens=self.schedule.data_tokens(step, self.positions_per_step),
            positions=step * self.positions_per_step,
            flops=float(step * self.flops_per_step),
        )

    def describe_phases(self) -> list[str]:
        """Return a line per phase, with its length, bag size and text."""
        return [
            f"phase {number}: {phase.num_steps} steps, bag size {phase.bag_size}, "
            f"{short(phase.num_steps * self.positions_per_step * phase.tokens_per_position)} data tokens, "
            f"{epochs:.2f} epochs of its documents"
            for number, (phase, epochs) in enumerate(zip(self.schedule.phases, self.epochs, strict=True), 1)
        ]


def learning_rates(parameter_groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the learning rate of each parameter group, keyed ``decay`` or ``no_decay`` (norms and biases).

    Args:
        parameter_groups: groups of a megatron-core optimizer; those of experts have names of their own.
    """
    rates = {}
    for group in parameter_groups:
        kind = "decay" if group.get("wd_mult", 1.0) else "no_decay"
        rates[f"expert_{kind}" if group.get("is_expert_parallel") else kind] = float(group["lr"])
    return rates


def step_metrics(
    facts: RunFacts,
    step: int,
    *,
    loss: float,
    grad_norm: float,
    lr_by_group: dict[str, float],
    interval: Interval,
    gpu_hours: float,
) -> StepMetrics:
    """Return the metric line of a logged step.

    Args:
        facts: constants of the run.
        step: 1-based number of the step.
        loss: loss of the step.
        grad_norm: global gradient norm before clipping.
        lr_by_group: learning rate of each parameter group.
        interval: steps since the previous line, including this step.
        gpu_hours: GPU-hours since the start of the run, over all ranks.
    """
    point = facts.schedule.phase_at(step - 1)
    now, before = facts.totals(step), facts.totals(step - interval.steps)
    tflops = interval.steps * facts.flops_per_step / interval.seconds / facts.world_size / 1e12
    peak, parts = peak_tflops(facts.device_name), interval.parts
    return StepMetrics(
        step=step,
        phase=point.index,
        bag_size=point.bag_size,
        loss_kind="ce" if point.bag_size == 1 else facts.objective,
        loss=loss,
        lr=max(lr_by_group.values()),
        lr_by_group=lr_by_group,
        grad_norm=grad_norm,
        data_tokens=now.data_tokens,
        positions=now.positions,
        flops=now.flops,
        gpu_hours=gpu_hours,
        step_time_s=interval.seconds / interval.steps,
        data_tokens_per_s=(now.data_tokens - before.data_tokens) / interval.seconds,
        positions_per_s=(now.positions - before.positions) / interval.seconds,
        tflops_per_gpu=tflops,
        mfu=None if peak is None else tflops / peak,
        data_time_s=None if interval.data_s is None else interval.data_s / interval.steps,
        forward_backward_time_s=None if parts is None else parts.forward_backward_s / interval.steps,
        optimizer_time_s=None if parts is None else parts.optimizer_s / interval.steps,
        communication_time_s=None if parts is None else parts.communication_s / interval.steps,
        data_epochs=(point.step + 1) / point.phase.num_steps * facts.epochs[point.index],
        memory_gib=peak_memory_bytes() / 2**30,
    )


def skipped_metrics(
    step: int, point: PhasePoint, loss: float, grad_norm: float, global_batch_size: int
) -> SkippedMetrics:
    """Return the metric line of a step that was not applied, with the samples that it had read."""
    return SkippedMetrics(
        step=step,
        phase=point.index,
        bag_size=point.bag_size,
        first_sample=point.step * global_batch_size,
        last_sample=(point.step + 1) * global_batch_size - 1,
        skipped_loss=f"{loss:g}",
        skipped_grad_norm=f"{grad_norm:g}",
    )


def valid_metrics(
    facts: RunFacts, step: int, loss: float, bits_per_byte: float | None, gpu_hours: float
) -> ValidMetrics:
    """Return the metric line of an evaluation after ``step`` steps."""
    now = facts.totals(step)
    return ValidMetrics(
        step=step,
        valid_loss=loss,
        bits_per_byte=bits_per_byte,
        data_tokens=now.data_tokens,
        positions=now.positions,
        flops=now.flops,
        gpu_hours=gpu_hours,
    )
