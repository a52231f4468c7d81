"""The training loop: one loop over steps, whatever the phases."""

import dataclasses
import logging
import time

import torch

from megatron_tst.config import DivergedError
from megatron_tst.data.batches import Batch, TextReader
from megatron_tst.platform import any_rank
from megatron_tst.platform.device import peak_memory_bytes
from megatron_tst.platform.signals import StopSignals
from megatron_tst.superposition import Phase, PhasePoint
from megatron_tst.telemetry import (
    ExpertMetrics,
    MetricsFile,
    SkippedMetrics,
    StepMetrics,
    TrainingProgress,
    ValidMetrics,
    versions,
)
from megatron_tst.telemetry.flops import peak_tflops
from megatron_tst.telemetry.sinks import BackgroundSink, numbers, open_sinks
from megatron_tst.training.pace import Pace
from megatron_tst.training.run import Run
from megatron_tst.training.step import StepReport
from megatron_tst.training.stop import DivergenceGuard, StopConditions

logger = logging.getLogger(__name__)


def train(run: Run) -> bool:
    """Train to the end of the schedule, or until asked to stop; what was done is saved either way.

    Collective: every rank of the world calls it.

    Returns:
        Whether the end was reached.

    Raises:
        UserError: if a checkpoint cannot be written, or the data names tokens beyond the vocabulary.
        DivergedError: if loss or gradient stays not finite.
    """
    reader = run.read(run.data.train, run.schedule, run.config.data.num_workers, run.first_step)
    monitor = Monitor(run)
    guard = DivergenceGuard(run.config.training.max_nan_steps)
    try:
        with monitor.progress, StopSignals() as signals:
            conditions = StopConditions(run.config.checkpoint, signals)
            for step in range(run.first_step, run.schedule.num_steps):
                point = run.schedule.phase_at(step)
                started_s = time.perf_counter()
                batches = read_step(run, reader, point.phase)
                data_s = time.perf_counter() - started_s
                report = run.stepper.train(batches)
                monitor.record(step + 1, point, report, data_s)
                guard.check(step + 1, report)
                if _is_due(step + 1, run.config.training.eval_interval, run):
                    with monitor.pace.paused():
                        monitor.record_valid(step + 1, evaluate(run))
                if _save_and_ask(run, monitor, conditions, step + 1):
                    return False
        return True
    except DivergedError:
        # Raised on every rank: a checkpoint from before that is still being written is not lost.
        run.saver.finish()
        raise
    finally:
        reader.close()
        monitor.close()
        run.directory.leave()


def _save_and_ask(run: Run, monitor: "Monitor", conditions: StopConditions, step: int) -> bool:
    """Save if it is time to, and return whether to stop: a signal may have reached one rank only.

    Collective: every rank of the world calls it.
    """
    reason = conditions.reason(step)
    is_asked, is_writing = any_rank(reason is not None, run.saver.is_writing)
    if run.saver.has_unpublished and not is_writing:
        run.saver.finish()
    is_end = step == run.schedule.num_steps
    interval = run.config.checkpoint.save_interval
    if is_asked or step in run.schedule.ends or (interval is not None and step % interval == 0):
        with monitor.pace.paused():
            monitor.sync()
            run.save(step)
    if is_asked or is_end:
        run.saver.finish()
    if is_asked and not is_end:
        monitor.note(
            f"stopped after step {step} by {reason or 'a signal to another rank'}; "
            f"go on with --load {run.saver.folders.path}"
        )
    return is_asked and not is_end


def evaluate(run: Run) -> float | None:
    """Return the next-token loss over the validation samples, the same ones every time; None if there are none.

    Collective: every rank of the world calls it.
    """
    schedule = run.validation
    if schedule is None:
        return None
    assert run.data.valid is not None
    reader = run.read(run.data.valid, schedule, num_workers=0)
    losses = [run.stepper.evaluate(read_step(run, reader, schedule.phases[0])) for _ in range(schedule.num_steps)]
    return float(torch.stack(losses).mean())


def read_step(run: Run, reader: TextReader, phase: Phase) -> list[Batch | None]:
    """Return this rank's micro-batches of one step; None on stages that own no text.

    Collective: every rank of the tensor-parallel group calls it.
    """
    shape = run.batch_shape(phase)
    count = run.stepper.num_microbatches
    return [reader.read(shape) if run.ranks.owns_text else None for _ in range(count)]


def _is_due(step: int, interval: int, run: Run) -> bool:
    return step % interval == 0 or step == run.schedule.num_steps


class Monitor:
    """Turns step reports into metrics; the main rank writes and shows them."""

    def __init__(self, run: Run) -> None:
        """Open the metrics file of a run."""
        self._run = run
        self._main = run.ranks.is_main
        self._file = MetricsFile(run.directory.metrics) if self._main else None
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

    def _open_sinks(self) -> list[BackgroundSink]:
        run = self._run
        facts = {**dataclasses.asdict(run.config), "phases_run": str(run.schedule.phases), "versions": versions()}
        positions = run.first_step * self._positions_per_step
        done = {"step": run.first_step, "data_tokens": self._last_tokens, "positions": positions}
        return open_sinks(run.config.logging, run.directory, facts, done)

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
        # The last step of a phase is logged too: its line is the phase's result.
        is_phase_end = step in self._run.schedule.ends
        if not (is_phase_end or _is_due(step, self._run.config.logging.log_interval, self._run)):
            return
        self._record_experts(step)
        if self._main:
            self._record_step(step, point, report)

    def _record_step(self, step: int, point: PhasePoint, report: StepReport) -> None:
        run, pace = self._run, self.pace.take()
        tokens = run.schedule.data_tokens(step, self._positions_per_step)
        tflops = pace.steps * run.flops_per_step / pace.seconds / run.ranks.world_size / 1e12
        peak = peak_tflops(run.device.name)
        metrics = StepMetrics(
            step=step,
            phase=point.index,
            bag_size=point.bag_size,
            loss_kind="ce" if point.bag_size == 1 else run.config.superposition.tst_objective,
            loss=float(report.loss),
            lr=report.lr,
            grad_norm=report.grad_norm,
            data_tokens=tokens,
            positions=step * self._positions_per_step,
            step_time_s=pace.seconds / pace.steps,
            data_tokens_per_s=(tokens - self._last_tokens) / pace.seconds,
            positions_per_s=pace.steps * self._positions_per_step / pace.seconds,
            tflops_per_gpu=tflops,
            mfu=None if peak is None else tflops / peak,
            data_time_s=pace.data_s / pace.steps,
            forward_backward_time_s=pace.forward_backward_s / pace.steps,
            optimizer_time_s=pace.optimizer_s / pace.steps,
            data_epochs=(point.step + 1) * self._epochs_per_step[point.index],
            memory_gib=peak_memory_bytes() / 2**30,
        )
        self._write(metrics)
        self.progress.show_step(metrics)
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
        counts_LE = self._run.expert_counter.take().double()
        load_LE = counts_LE / counts_LE.mean(dim=1, keepdim=True)
        if self._main:
            self._write(ExpertMetrics(step, load_LE.amax(dim=1).tolist(), load_LE.amin(dim=1).tolist()))

    def record_valid(self, step: int, loss: float | None) -> None:
        """Log an evaluation."""
        if self._file is not None and loss is not None:
            tokens = self._run.schedule.data_tokens(step, self._positions_per_step)
            metrics = ValidMetrics(step, loss, data_tokens=tokens, positions=step * self._positions_per_step)
            self._write(metrics)
            self.progress.show_valid(metrics)

    def _write(self, metrics: StepMetrics | ValidMetrics | ExpertMetrics | SkippedMetrics) -> None:
        """Write a line to the file, and offer it to the sinks."""
        assert self._file is not None
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
            self._file.sync()

    def close(self) -> None:
        """Close the metrics file and the sinks."""
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()
