"""Turns Megatron-LM's reports of steps and evaluations into metrics, the same as the own trainer's."""

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.config import UserError
from megatron_tst.distributed import ParallelState, run_on_main_rank
from megatron_tst.telemetry import RunDirectory, TrainingProgress, read_metrics
from megatron_tst.telemetry.metrics_writer import MetricsWriter
from megatron_tst.telemetry.run_metrics import Interval, RunFacts, step_metrics, valid_metrics
from megatron_tst.telemetry.switch import SwitchWatch


class Monitor:
    """Counts steps; the main rank writes their metrics.

    Attributes:
        step: number of steps done.
    """

    def __init__(
        self,
        facts: RunFacts,
        directory: RunDirectory,
        ranks: ParallelState,
        *,
        log_interval: int,
        first_step: int,
        gpu_hours: float,
        bytes_per_target: float | None,
    ) -> None:
        """Open the metrics file.

        Collective: every rank of the world calls it.

        Args:
            facts: constants of the run.
            directory: directory of the run.
            ranks: parallel state of this rank.
            log_interval: number of steps between lines of metrics.
            first_step: number of steps already done.
            gpu_hours: GPU-hours that these steps took.
            bytes_per_target: bytes of validation text per target; None if unknown. Only the main rank's value is used.

        Raises:
            UserError: if the file cannot be written.
        """
        self.step = first_step
        self._facts, self._ranks, self._directory = facts, ranks, directory
        self._log_interval, self._bytes_per_target = log_interval, bytes_per_target
        run_on_main_rank(directory.touch_metrics)
        self._writer = MetricsWriter(directory.metrics, ()) if ranks.is_main else None
        lines = read_metrics(directory.metrics) if ranks.is_main else []
        self._switches = SwitchWatch(facts.schedule.ends, lines)
        self._progress = TrainingProgress(facts.schedule.num_steps, len(facts.schedule.phases), visible=False)
        self._gpu_hours = gpu_hours
        self._seconds, self._steps, self._evaluated_at = 0.0, 0, -1

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of training, over all ranks and all starts of the run."""
        return self._gpu_hours + self._seconds * self._ranks.world_size / 3600

    @property
    def failure(self) -> str | None:
        """Why metrics cannot be written, on the main rank, or None; the run must then save and stop."""
        return self._writer.failure if self._writer else None

    def record(
        self, step: int, losses: dict[str, Tensor], grad_norm: float, lr_by_group: dict[str, float], started_s: float
    ) -> None:
        """Count a step whose update was applied, and log it if a line is due.

        Collective: every rank of a pipeline calls it.

        Args:
            step: 1-based number of the step.
            losses: losses as the last pipeline stage reports them; empty on the other stages.
            grad_norm: gradient norm before clipping.
            lr_by_group: learning rate of each parameter group.
            started_s: start of the step, in seconds of ``time.perf_counter``.
        """
        loss = self._share(losses)
        self.step = step
        self._seconds += time.perf_counter() - started_s
        self._steps += 1
        if self._writer is None:
            return
        schedule = self._facts.schedule
        point = schedule.phase_at(step - 1)
        for change in self._switches.add(step, point.index, point.bag_size, loss):
            self._writer.write(change)
            self._progress.show_switch(change)
        if step not in schedule.ends and step % self._log_interval:
            return
        self._gpu_hours, interval = self.gpu_hours, Interval(self._steps, self._seconds)
        self._seconds, self._steps = 0.0, 0
        metrics = step_metrics(
            self._facts,
            step,
            loss=loss,
            grad_norm=grad_norm,
            lr_by_group=lr_by_group,
            interval=interval,
            gpu_hours=self._gpu_hours,
        )
        self._writer.write(metrics)
        self._progress.show_step(metrics, (schedule.num_steps - step) * metrics.step_time_s)

    def _share(self, losses: dict[str, Tensor]) -> float:
        """Return the last stage's loss on every rank of the pipeline."""
        loss = losses.get("lm loss", torch.zeros((), device=torch.cuda.current_device())).detach().clone()
        if self._ranks.groups.pp.size() > 1:
            dist.broadcast(loss, self._ranks.last_stage_rank, group=self._ranks.groups.pp)
        return float(loss)

    def record_valid(self, losses: dict[str, Any]) -> None:
        """Log an evaluation, once per step: at the end of a run Megatron-LM may evaluate the last step again.

        Collective: every rank of a pipeline calls it.

        Args:
            losses: losses as the last pipeline stage reports them; empty on the other stages.
        """
        loss = self._share(losses)
        if self._writer is None or self._evaluated_at == self.step:
            return
        self._evaluated_at = self.step
        per_target = self._bytes_per_target
        bits_per_byte = None if per_target is None else loss / (per_target * math.log(2))
        metrics = valid_metrics(self._facts, self.step, loss, bits_per_byte, self.gpu_hours)
        self._writer.write(metrics)
        self._progress.show_valid(metrics)

    def sync(self) -> None:
        """Wait until the metrics are on disk: a checkpoint must not be ahead of the metrics file."""
        if self._writer is not None:
            self._writer.sync()

    def check(self) -> None:
        """End the run if metrics cannot be written.

        Collective: every rank of the world calls it.

        Raises:
            UserError: on every rank.
        """

        def tell() -> None:
            """Raise the error on the main rank."""
            if self.failure is not None:
                raise UserError(
                    f"--tst-run-dir: {self._directory.metrics} cannot be written: {self.failure}; a checkpoint was "
                    f"saved after step {self.step}"
                )

        run_on_main_rank(tell)
