"""The training loop: one loop over steps, whatever the phases."""

import time

import torch

from megatron_tst.data.batches import Batch, TextReader
from megatron_tst.superposition import Phase, PhasePoint
from megatron_tst.telemetry import ExpertMetrics, MetricsFile, StepMetrics, TrainingProgress, ValidMetrics
from megatron_tst.training.run import Run
from megatron_tst.training.step import StepReport


def train(run: Run) -> None:
    """Train to the end of the schedule.

    Collective: every rank of the world calls it.
    """
    reader = run.read(run.data.train, run.schedule, run.config.data.num_workers)
    monitor = Monitor(run)
    with monitor.progress:
        for step in range(run.schedule.num_steps):
            point = run.schedule.phase_at(step)
            report = run.stepper.train(read_step(run, reader, point.phase))
            monitor.record(step + 1, point, report)
            if _is_due(step + 1, run.config.training.eval_interval, run):
                monitor.record_valid(step + 1, evaluate(run))
    monitor.close()


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
        self.progress = TrainingProgress(run.schedule.num_steps, len(run.schedule.phases), visible=self._main)
        self._last_step = self._last_tokens = 0
        self._last_time = time.perf_counter()

    def record(self, step: int, point: PhasePoint, report: StepReport) -> None:
        """Count a step, and log it if a line is due.

        Collective for a mixture of experts: every rank of the world calls it.
        """
        self.progress.advance(step)
        # The last step of a phase is logged too: its line is the phase's result.
        is_phase_end = step in self._run.schedule.ends
        if not (is_phase_end or _is_due(step, self._run.config.logging.log_interval, self._run)):
            return
        self._record_experts(step)
        if self._file is None:
            return
        loss = float(report.loss)  # waits for the device, so that the time below is the steps' own
        now = time.perf_counter()
        seconds, steps = now - self._last_time, step - self._last_step
        assert self._run.config.model.seq_length
        positions_per_step = self._run.global_batch_size * self._run.config.model.seq_length
        tokens = self._run.schedule.data_tokens(step, positions_per_step)
        metrics = StepMetrics(
            step=step,
            phase=point.index,
            bag_size=point.bag_size,
            loss_kind="ce" if point.bag_size == 1 else self._run.config.superposition.tst_objective,
            loss=loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            data_tokens=tokens,
            positions=step * positions_per_step,
            step_time_s=seconds / steps,
            data_tokens_per_s=(tokens - self._last_tokens) / seconds,
            positions_per_s=steps * positions_per_step / seconds,
            tflops_per_gpu=steps * self._run.flops_per_step / seconds / self._run.ranks.world_size / 1e12,
        )
        self._file.write(metrics)
        self.progress.show_step(metrics)
        self._last_step, self._last_tokens, self._last_time = step, tokens, now

    def _record_experts(self, step: int) -> None:
        """Log the experts' load; every rank has counted a part of it."""
        if self._run.expert_counter is None:
            return
        counts_LE = self._run.expert_counter.take().double()
        load_LE = counts_LE / counts_LE.mean(dim=1, keepdim=True)
        if self._file is not None:
            self._file.write(ExpertMetrics(step, load_LE.amax(dim=1).tolist(), load_LE.amin(dim=1).tolist()))

    def record_valid(self, step: int, loss: float | None) -> None:
        """Log an evaluation; its time does not count as a step's."""
        if self._file is not None and loss is not None:
            metrics = ValidMetrics(step=step, valid_loss=loss)
            self._file.write(metrics)
            self.progress.show_valid(metrics)
        self._last_time = time.perf_counter()

    def close(self) -> None:
        """Close the metrics file."""
        if self._file is not None:
            self._file.close()
