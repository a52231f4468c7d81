"""Pure functions that turn the results of a step, an evaluation or the routers into metric lines."""

from dataclasses import dataclass

from megatron_tst.distributed.device import peak_memory_bytes
from megatron_tst.shape.flops import peak_tflops
from megatron_tst.superposition import PhasePoint
from megatron_tst.telemetry import ExpertMetrics, SkippedMetrics, StepMetrics, ValidMetrics
from megatron_tst.training.evaluation import Evaluation
from megatron_tst.training.experts import ExpertCounts
from megatron_tst.training.run import Run
from megatron_tst.training.step import StepReport
from megatron_tst.training.step_timer import Interval


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


def totals(run: Run, step: int) -> Totals:
    """Return the totals of the first ``step`` optimizer steps of a run."""
    return Totals(
        data_tokens=run.schedule.data_tokens(step, run.positions_per_step),
        positions=step * run.positions_per_step,
        flops=float(step * run.flops_per_step),
    )


def step_metrics(
    run: Run, step: int, point: PhasePoint, report: StepReport, interval: Interval, gpu_hours: float
) -> StepMetrics:
    """Return the metric line of a logged step.

    Args:
        run: the run that takes the steps.
        step: 1-based number of the step.
        point: place of the step in the schedule.
        report: result of the step.
        interval: times of the steps since the previous line, including this step.
        gpu_hours: GPU-hours since the start of the run, over all ranks.
    """
    now, before = totals(run, step), totals(run, step - interval.steps)
    tflops = interval.steps * run.flops_per_step / interval.seconds / run.ranks.world_size / 1e12
    peak = peak_tflops(run.device.name)
    epochs_per_step = run.data.train.phases[point.index].num_epochs / point.phase.num_steps
    return StepMetrics(
        step=step,
        phase=point.index,
        bag_size=point.bag_size,
        loss_kind="ce" if point.bag_size == 1 else run.config.superposition.tst_objective,
        loss=float(report.loss),
        lr=report.lr,
        lr_by_group=report.lr_by_group,
        grad_norm=report.grad_norm,
        data_tokens=now.data_tokens,
        positions=now.positions,
        flops=now.flops,
        gpu_hours=gpu_hours,
        step_time_s=interval.seconds / interval.steps,
        data_tokens_per_s=(now.data_tokens - before.data_tokens) / interval.seconds,
        positions_per_s=(now.positions - before.positions) / interval.seconds,
        tflops_per_gpu=tflops,
        mfu=None if peak is None else tflops / peak,
        data_time_s=interval.data_s / interval.steps,
        forward_backward_time_s=interval.forward_backward_s / interval.steps,
        optimizer_time_s=interval.optimizer_s / interval.steps,
        communication_time_s=interval.communication_s / interval.steps,
        data_epochs=(point.step + 1) * epochs_per_step,
        memory_gib=peak_memory_bytes() / 2**30,
    )


def skipped_metrics(step: int, point: PhasePoint, report: StepReport, global_batch_size: int) -> SkippedMetrics:
    """Return the metric line of a step that was not applied, with the samples that it had read."""
    return SkippedMetrics(
        step=step,
        phase=point.index,
        bag_size=point.bag_size,
        first_sample=point.step * global_batch_size,
        last_sample=(point.step + 1) * global_batch_size - 1,
        skipped_loss=f"{float(report.loss):g}",
        skipped_grad_norm=f"{report.grad_norm:g}",
    )


def expert_metrics(step: int, counts: ExpertCounts) -> ExpertMetrics:
    """Return the metric line of the experts' load, where 1 is the mean of a layer."""
    load_LE = counts.taken / counts.taken.double().mean(dim=1, keepdim=True)
    dropped_L = 1 - counts.taken.sum(dim=1) / counts.chosen.double()
    return ExpertMetrics(step, load_LE.amax(dim=1).tolist(), load_LE.amin(dim=1).tolist(), dropped_L.tolist())


def valid_metrics(run: Run, step: int, evaluation: Evaluation, gpu_hours: float) -> ValidMetrics:
    """Return the metric line of an evaluation after ``step`` steps."""
    now = totals(run, step)
    return ValidMetrics(
        step=step,
        valid_loss=evaluation.loss,
        bits_per_byte=evaluation.bits_per_byte,
        data_tokens=now.data_tokens,
        positions=now.positions,
        flops=now.flops,
        gpu_hours=gpu_hours,
    )
