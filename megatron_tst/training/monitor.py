"""From step reports to metrics, in the file, in the sinks and on the screen."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

from megatron_tst.config import UserError
from megatron_tst.distributed import main_rank_alone
from megatron_tst.distributed.device import peak_memory_bytes
from megatron_tst.shape.flops import peak_tflops
from megatron_tst.superposition import PhasePoint
from megatron_tst.telemetry import (
    ExpertMetrics,
    Metrics,
    MetricsFile,
    SkippedMetrics,
    StepMetrics,
    TrainingProgress,
    ValidMetrics,
    read_metrics,
    versions,
)
from megatron_tst.telemetry.sinks import BackgroundSink, numbers, open_sinks
from megatron_tst.telemetry.switch import SwitchWatch
from megatron_tst.telemetry.time_left import seconds_left
from megatron_tst.training.evaluation import Evaluation
from megatron_tst.training.pace import Pace
from megatron_tst.training.run import Run
from megatron_tst.training.step import StepReport

logger = logging.getLogger(__name__)


def is_due(step: int, interval: int, run: Run) -> bool:
    """Return whether something that happens every ``interval`` steps, and at the end, is due after ``step`` steps."""
    return step % interval == 0 or step == run.schedule.num_steps


class Monitor:
    """Turns step reports into metrics; the main rank writes and shows them.

    Attributes:
        failure: of the disk to take metrics, on the main rank: the run is to save and stop.
    """

    def __init__(self, run: Run) -> None:
        """Open the metrics file of a run.

        Collective: every rank of the world calls it.

        Raises:
            UserError: if it cannot be opened.
        """
        self._run = run
        self.failure: str | None = None
        main_rank_alone(self._touch)
        self._main = run.ranks.is_main
        self._file = MetricsFile(run.directory.metrics) if self._main else None
        lines = read_metrics(run.directory.metrics) if self._main else []
        self._switches = SwitchWatch(run.schedule.ends, lines)
        self._logged_gpu_hours = run.gpu_hours
        self.progress = TrainingProgress(
            run.schedule.num_steps, len(run.schedule.phases), visible=self._main, first_step=run.first_step
        )
        assert run.config.model.seq_length
        self._positions_per_step = run.global_batch_size * run.config.model.seq_length
        self._last_tokens = run.schedule.data_tokens(run.first_step, self._positions_per_step)
        self._epochs_per_step = [
            text.num_epochs / phase.num_steps
            for text, phase in zip(run.data.train.phases, run.schedule.phases, strict=True)
        ]
        self._sinks = self._open_sinks() if self._main else []
        self.pace = Pace()
        self._step_s_by_phase: dict[int, float] = {}

    def _touch(self) -> None:
        path = self._run.directory.metrics
        try:
            path.touch()
        except OSError as error:
            raise UserError(f"--tst-run-dir: {path} cannot be written: {error.strerror}") from error

    def _open_sinks(self) -> list[BackgroundSink]:
        run = self._run
        facts = {**dataclasses.asdict(run.config), "phases_run": str(run.schedule.phases), "versions": versions()}
        positions = run.first_step * self._positions_per_step
        done = {"step": run.first_step, "data_tokens": self._last_tokens, "positions": positions}
        return open_sinks(run.config.logging, run.directory, facts, done)

    @property
    def gpu_hours(self) -> float:
        """Hours of training over all ranks and all starts of the run, as the main rank counts them."""
        return self._logged_gpu_hours + self.pace.seconds * self._run.ranks.world_size / 3600

    def record(self, step: int, point: PhasePoint, report: StepReport, data_s: float) -> None:
        """Count a step, and log it if a line is due or it was not applied.

        Collective for a mixture of experts: every rank of the world calls it.

        Args:
            step: 1-based.
            point: where it lies.
            report: what it did.
            data_s: how long it waited for text.
        """
        self.progress.advance(step)
        self.pace.add(data_s, report)
        if not report.is_applied:
            self._record_skipped(step, point, report)
            return
        if self._main:
            for metrics in self._switches.add(step, point.index, point.bag_size, float(report.loss)):
                self._write(metrics)
                self.progress.show_switch(metrics)
        # The last step of a phase is logged too: its line is the phase's result.
        is_phase_end = step in self._run.schedule.ends
        if not (is_phase_end or is_due(step, self._run.config.logging.log_interval, self._run)):
            return
        self._record_experts(step)
        if self._main:
            self._record_step(step, point, report)

    def _record_step(self, step: int, point: PhasePoint, report: StepReport) -> None:
        run, pace = self._run, self.pace.take()
        tokens = run.schedule.data_tokens(step, self._positions_per_step)
        tflops = pace.steps * run.flops_per_step / pace.seconds / run.ranks.world_size / 1e12
        peak = peak_tflops(run.device.name)
        self._logged_gpu_hours += pace.seconds * run.ranks.world_size / 3600
        metrics = StepMetrics(
            step=step,
            phase=point.index,
            bag_size=point.bag_size,
            loss_kind="ce" if point.bag_size == 1 else run.config.superposition.tst_objective,
            loss=float(report.loss),
            lr=report.lr,
            lr_by_group=report.lr_by_group,
            grad_norm=report.grad_norm,
            data_tokens=tokens,
            positions=step * self._positions_per_step,
            flops=float(step * run.flops_per_step),
            gpu_hours=self._logged_gpu_hours,
            step_time_s=pace.seconds / pace.steps,
            data_tokens_per_s=(tokens - self._last_tokens) / pace.seconds,
            positions_per_s=pace.steps * self._positions_per_step / pace.seconds,
            tflops_per_gpu=tflops,
            mfu=None if peak is None else tflops / peak,
            data_time_s=pace.data_s / pace.steps,
            forward_backward_time_s=pace.forward_backward_s / pace.steps,
            optimizer_time_s=pace.optimizer_s / pace.steps,
            communication_time_s=pace.communication_s / pace.steps,
            data_epochs=(point.step + 1) * self._epochs_per_step[point.index],
            memory_gib=peak_memory_bytes() / 2**30,
        )
        self._write(metrics)
        self._step_s_by_phase[point.index] = metrics.step_time_s
        left_s = seconds_left(run.schedule.ends, step, self._step_s_by_phase)
        self.progress.show_step(metrics, left_s + (run.schedule.num_steps - step) * self.pace.pause_s_per_step)
        self._last_tokens = tokens

    def _record_skipped(self, step: int, point: PhasePoint, report: StepReport) -> None:
        """Tell which text a step that was not applied had read."""
        if self._file is None:
            return
        size = self._run.global_batch_size
        metrics = SkippedMetrics(
            step=step,
            phase=point.index,
            bag_size=point.bag_size,
            first_sample=point.step * size,
            last_sample=(point.step + 1) * size - 1,
            skipped_loss=f"{float(report.loss):g}",
            skipped_grad_norm=f"{report.grad_norm:g}",
        )
        self._write(metrics)
        self.note(
            f"WARNING: step {step} is not applied: loss {metrics.skipped_loss}, gradient norm "
            f"{metrics.skipped_grad_norm}, in phase {point.index + 1} (bag size {point.bag_size}), "
            f"samples {metrics.first_sample} to {metrics.last_sample}"
        )

    def _record_experts(self, step: int) -> None:
        """Log the experts' load; every rank has counted a part of it."""
        if self._run.expert_counter is None:
            return
        counts = self._run.expert_counter.take()
        load_LE = counts.taken / counts.taken.double().mean(dim=1, keepdim=True)
        dropped_L = 1 - counts.taken.sum(dim=1) / counts.chosen.double()
        if self._main:
            load_max, load_min = load_LE.amax(dim=1).tolist(), load_LE.amin(dim=1).tolist()
            self._write(ExpertMetrics(step, load_max, load_min, dropped_L.tolist()))

    def record_valid(self, step: int, evaluation: Evaluation | None) -> None:
        """Log an evaluation."""
        if self._file is not None and evaluation is not None:
            metrics = ValidMetrics(
                step=step,
                valid_loss=evaluation.loss,
                bits_per_byte=evaluation.bits_per_byte,
                data_tokens=self._run.schedule.data_tokens(step, self._positions_per_step),
                positions=step * self._positions_per_step,
                flops=float(step * self._run.flops_per_step),
                gpu_hours=self.gpu_hours,
            )
            self._write(metrics)
            self.progress.show_valid(metrics)

    def _write(self, metrics: Metrics) -> None:
        """Write a line to the file, and offer it to the sinks."""
        assert self._file is not None
        if self.failure is None:
            with self._noting_failure():
                self._file.write(metrics)
        for sink in self._sinks:
            sink.offer(numbers(metrics))

    def note(self, line: str) -> None:
        """Log a line, on the main rank."""
        if self._main:
            logger.info(line)

    def sync(self) -> None:
        """Wait until the metrics file is on disk: a checkpoint must not know more than it does."""
        if self._file is not None:
            with self._noting_failure():
                self._file.sync()

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Keep what the disk says: raised here, on one rank, it would leave the others waiting and the run unsaved."""
        try:
            yield
        except OSError as error:
            self.failure = error.strerror

    def check(self, step: int) -> None:
        """End the run if metrics could not be written, once it is saved.

        Collective: every rank of the world calls it.

        Raises:
            UserError: on every rank.
        """
        folder = self._run.saver.folders.path

        def tell() -> None:
            """Raise the error on the main rank."""
            if self.failure is not None:
                raise UserError(
                    f"--tst-run-dir: {self._run.directory.metrics} cannot be written: {self.failure}; saved after step "
                    f"{step}, go on with --load {folder}"
                )

        main_rank_alone(tell)

    def close(self) -> None:
        """Close the metrics file and the sinks."""
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()
