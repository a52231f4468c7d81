"""Decides which metrics are logged after which step, and sends them to the metrics file, the sinks and the screen."""

import dataclasses
import logging

from megatron_tst.config import UserError
from megatron_tst.distributed import run_on_main_rank
from megatron_tst.superposition import PhasePoint
from megatron_tst.telemetry import TrainingProgress, read_metrics, versions
from megatron_tst.telemetry.metrics_writer import MetricsWriter
from megatron_tst.telemetry.run_metrics import skipped_metrics, step_metrics, valid_metrics
from megatron_tst.telemetry.sinks import open_sinks
from megatron_tst.telemetry.switch import SwitchWatch
from megatron_tst.telemetry.time_left import seconds_left
from megatron_tst.training.evaluation import Evaluation
from megatron_tst.training.run import Run
from megatron_tst.training.step import StepReport
from megatron_tst.training.step_timer import StepTimer

logger = logging.getLogger(__name__)


def is_due(step: int, interval: int, num_steps: int) -> bool:
    """Return whether an action that is due every ``interval`` steps and at the end is due after ``step`` steps."""
    return step % interval == 0 or step == num_steps


class MetricsLogger:
    """Turns step reports into metrics; the main rank writes and displays them.

    Attributes:
        timer: the step timer.
        progress: the progress display on the screen.
    """

    def __init__(self, run: Run) -> None:
        """Open the metrics file of a run.

        Collective: every rank of the world calls it.

        Raises:
            UserError: if the file cannot be opened.
        """
        self._run, self._facts = run, run.facts
        run_on_main_rank(run.directory.touch_metrics)
        self._writer = self._open() if run.ranks.is_main else None
        lines = read_metrics(run.directory.metrics) if run.ranks.is_main else []
        self._switches = SwitchWatch(run.schedule.ends, lines)
        self._logged_gpu_hours = run.gpu_hours
        self.progress = TrainingProgress(
            run.schedule.num_steps, len(run.schedule.phases), visible=run.ranks.is_main, first_step=run.first_step
        )
        self.timer = StepTimer()
        self._step_s_by_phase: dict[int, float] = {}

    def _open(self) -> MetricsWriter:
        run, done = self._run, self._facts.totals(self._run.first_step)
        facts = {**dataclasses.asdict(run.config), "phases_run": str(run.schedule.phases), "versions": versions()}
        start = {"step": run.first_step, "data_tokens": done.data_tokens, "positions": done.positions}
        return MetricsWriter(run.directory.metrics, open_sinks(run.config.logging, run.directory, facts, start))

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of training over all ranks and all starts of the run, as counted by the main rank."""
        return self._logged_gpu_hours + self.timer.seconds * self._run.ranks.world_size / 3600

    @property
    def failure(self) -> str | None:
        """Why metrics cannot be written, on the main rank, or None; the run must then save and stop."""
        return self._writer.failure if self._writer else None

    def record(self, step: int, point: PhasePoint, report: StepReport) -> None:
        """Count a step, and log it if a line is due or if the step was not applied.

        Collective for an MoE model: every rank of the world calls it.

        Args:
            step: 1-based number of the step.
            point: place of the step in the schedule.
            report: result of the step.
        """
        schedule, interval = self._run.schedule, self._run.config.logging.log_interval
        self.progress.advance(step)
        self.timer.add(report.times)
        if not report.is_applied:
            self._record_skipped(step, point, report)
            return
        self._record_switch(step, point, report)
        # The last step of a phase is always logged: its line is the phase's result.
        if step in schedule.ends or is_due(step, interval, schedule.num_steps):
            self._record_experts(step)
            self._record_step(step, point.index, report)

    def _record_step(self, step: int, phase: int, report: StepReport) -> None:
        if self._writer is None:
            return
        run, interval = self._run, self.timer.take()
        self._logged_gpu_hours += interval.seconds * run.ranks.world_size / 3600
        metrics = step_metrics(
            self._facts,
            step,
            loss=float(report.loss),
            grad_norm=report.grad_norm,
            lr_by_group=report.lr_by_group,
            interval=interval,
            gpu_hours=self._logged_gpu_hours,
        )
        self._writer.write(metrics)
        self._step_s_by_phase[phase] = metrics.step_time_s
        left_s = seconds_left(run.schedule.ends, step, self._step_s_by_phase)
        self.progress.show_step(metrics, left_s + (run.schedule.num_steps - step) * self.timer.pause_s_per_step)

    def _record_switch(self, step: int, point: PhasePoint, report: StepReport) -> None:
        """Log how the loss reacts to a change of the bag size, once that is known."""
        if self._writer is not None:
            for metrics in self._switches.add(step, point.index, point.bag_size, float(report.loss)):
                self._writer.write(metrics)
                self.progress.show_switch(metrics)

    def _record_skipped(self, step: int, point: PhasePoint, report: StepReport) -> None:
        """Log which samples a step that was not applied had read."""
        if self._writer is None:
            return
        metrics = skipped_metrics(step, point, float(report.loss), report.grad_norm, self._run.global_batch_size)
        self._writer.write(metrics)
        self.log_line(
            f"WARNING: step {step} is not applied: loss {metrics.skipped_loss}, gradient norm "
            f"{metrics.skipped_grad_norm}, in phase {point.index + 1} (bag size {point.bag_size}), "
            f"samples {metrics.first_sample} to {metrics.last_sample}"
        )

    def _record_experts(self, step: int) -> None:
        """Log the experts' load, summed over all ranks."""
        if self._run.expert_counter is not None:
            counts = self._run.expert_counter.take()
            if self._writer is not None:
                self._writer.write(counts.metrics(step))

    def record_valid(self, step: int, evaluation: Evaluation | None) -> None:
        """Log the result of an evaluation."""
        if self._writer is not None and evaluation is not None:
            metrics = valid_metrics(self._facts, step, evaluation.loss, evaluation.bits_per_byte, self.gpu_hours)
            self._writer.write(metrics)
            self.progress.show_valid(metrics)

    def log_line(self, line: str) -> None:
        """Log a line of text, on the main rank."""
        if self._run.ranks.is_main:
            logger.info(line)

    def sync(self) -> None:
        """Wait until the metrics file is on disk, so that a checkpoint is never ahead of the metrics."""
        if self._writer is not None:
            self._writer.sync()

    def check(self, step: int) -> None:
        """Raise an error if metrics could not be written; called after the run has saved a checkpoint.

        Collective: every rank of the world calls it.

        Raises:
            UserError: on every rank.
        """
        folder = self._run.saver.folders.path

        def tell() -> None:
            """Raise the error on the main rank."""
            if self.failure is not None:
                raise UserError(
                    f"--tst-run-dir: {self._run.directory.metrics} cannot be written: {self.failure}; a checkpoint was "
                    f"saved after step {step}, continue with --load {folder}"
                )

        run_on_main_rank(tell)

    def close(self) -> None:
        """Close the metrics file and the sinks."""
        if self._writer is not None:
            self._writer.close()
