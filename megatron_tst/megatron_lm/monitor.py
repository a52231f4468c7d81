"""Writes the metrics of a run, in the same file and with the same names as the own trainer."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tst.config import UserError
from megatron_tst.distributed import Device, ParallelState, run_on_main_rank
from megatron_tst.distributed.device import peak_memory_bytes
from megatron_tst.shape.flops import peak_tflops
from megatron_tst.superposition import Schedule
from megatron_tst.telemetry import (
    Metrics,
    MetricsFile,
    RunDirectory,
    StepMetrics,
    TrainingProgress,
    ValidMetrics,
    read_metrics,
)
from megatron_tst.telemetry.switch import SwitchWatch


@dataclass(frozen=True)
class RunFacts:
    """Constants of a run from which metrics are computed.

    Attributes:
        schedule: schedule of the phases.
        objective: objective of the loss in the superposition phase.
        positions_per_step: number of positions per step, over all ranks.
        flops_per_step: FLOPs per step, over all ranks.
        epochs_per_step: for each phase, number of epochs of its documents that a step reads.
        log_interval: number of steps between lines of metrics.
        first_step: number of steps already done.
        gpu_hours: GPU-hours that these steps took.
        bytes_per_target: bytes of validation text per target; None if unknown. Only the main rank's value is used.
    """

    schedule: Schedule
    objective: str
    positions_per_step: int
    flops_per_step: float
    epochs_per_step: list[float]
    log_interval: int
    first_step: int
    gpu_hours: float
    bytes_per_target: float | None


class Monitor:
    """Turns Megatron-LM's reports of steps and evaluations into metrics; the main rank writes them.

    Attributes:
        step: number of steps done.
    """

    def __init__(self, facts: RunFacts, directory: RunDirectory, ranks: ParallelState, device: Device) -> None:
        """Open the metrics file.

        Collective: every rank of the world calls it.

        Raises:
            UserError: if the file cannot be written.
        """
        self.step = facts.first_step
        self._facts, self._ranks, self._device = facts, ranks, device
        self._path = directory.metrics
        run_on_main_rank(self._touch)
        self._file = MetricsFile(self._path) if ranks.is_main else None
        lines = read_metrics(self._path) if ranks.is_main else []
        self._switches = SwitchWatch(facts.schedule.ends, lines)
        self._progress = TrainingProgress(facts.schedule.num_steps, len(facts.schedule.phases), visible=False)
        self._gpu_hours = facts.gpu_hours
        self._last_tokens = facts.schedule.data_tokens(facts.first_step, facts.positions_per_step)
        self._seconds, self._steps, self._evaluated_at = 0.0, 0, -1

    def _touch(self) -> None:
        try:
            self._path.touch()
        except OSError as error:
            raise UserError(f"--tst-run-dir: {self._path} cannot be written: {error.strerror}") from error

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of training, over all ranks and all starts of the run."""
        return self._gpu_hours + self._seconds * self._ranks.world_size / 3600

    def record(
        self, step: int, losses: dict[str, Tensor], grad_norm: float, lr_by_group: dict[str, float], started_s: float
    ) -> None:
        """Count a step whose update was applied, and log it if a line is due.

        Collective: every rank of a pipeline calls it.

        Args:
            step: 1-based number of the step.
            losses: losses as the last pipeline stage reports them; empty on the other stages.
            grad_norm: gradient norm before clipping.
            lr_by_group: learning rate of the step for each kind of parameters.
            started_s: start of the step, in seconds of ``time.perf_counter``.
        """
        loss = self._share(losses)
        self.step = step
        self._seconds += time.perf_counter() - started_s
        self._steps += 1
        if self._file is None:
            return
        point = self._facts.schedule.phase_at(step - 1)
        for metrics in self._switches.add(step, point.index, point.bag_size, loss):
            self._file.write(metrics)
            self._progress.show_switch(metrics)
        ends = self._facts.schedule.ends
        if step in ends or step % self._facts.log_interval == 0:
            self._record_step(step, loss, grad_norm, lr_by_group)

    def _share(self, losses: dict[str, Tensor]) -> float:
        """Return the last stage's loss on every rank of the pipeline."""
        loss = losses.get("lm loss", torch.zeros((), device=torch.cuda.current_device())).detach().clone()
        if self._ranks.groups.pp.size() > 1:
            dist.broadcast(loss, self._ranks.last_stage_rank, group=self._ranks.groups.pp)
        return float(loss)

    def _record_step(self, step: int, loss: float, grad_norm: float, lr_by_group: dict[str, float]) -> None:
        facts, ranks = self._facts, self._ranks.world_size
        point = facts.schedule.phase_at(step - 1)
        tokens = facts.schedule.data_tokens(step, facts.positions_per_step)
        tflops = self._steps * facts.flops_per_step / self._seconds / ranks / 1e12
        peak = peak_tflops(self._device.name)
        self._gpu_hours += self._seconds * ranks / 3600
        metrics = StepMetrics(
            step=step,
            phase=point.index,
            bag_size=point.bag_size,
            loss_kind="ce" if point.bag_size == 1 else facts.objective,  # type: ignore[arg-type]
            loss=loss,
            lr=max(lr_by_group.values()),
            lr_by_group=lr_by_group,
            grad_norm=grad_norm,
            data_tokens=tokens,
            positions=step * facts.positions_per_step,
            flops=float(step * facts.flops_per_step),
            gpu_hours=self._gpu_hours,
            step_time_s=self._seconds / self._steps,
            data_tokens_per_s=(tokens - self._last_tokens) / self._seconds,
            positions_per_s=self._steps * facts.positions_per_step / self._seconds,
            tflops_per_gpu=tflops,
            mfu=None if peak is None else tflops / peak,
            data_time_s=None,
            forward_backward_time_s=None,
            optimizer_time_s=None,
            communication_time_s=None,
            data_epochs=(point.step + 1) * facts.epochs_per_step[point.index],
            memory_gib=peak_memory_bytes() / 2**30,
        )
        self._write(metrics)
        self._progress.show_step(metrics, (facts.schedule.num_steps - step) * metrics.step_time_s)
        self._last_tokens, self._seconds, self._steps = tokens, 0.0, 0

    def record_valid(self, losses: dict[str, Any]) -> None:
        """Log an evaluation, once per step: at the end of a run Megatron-LM may evaluate the last step again.

        Collective: every rank of a pipeline calls it.

        Args:
            losses: losses as the last pipeline stage reports them; empty on the other stages.
        """
        loss, facts = self._share(losses), self._facts
        if self._file is None or self._evaluated_at == self.step:
            return
        self._evaluated_at = self.step
        per_target = facts.bytes_per_target
        metrics = ValidMetrics(
            step=self.step,
            valid_loss=loss,
            bits_per_byte=None if per_target is None else loss / (per_target * math.log(2)),
            data_tokens=facts.schedule.data_tokens(self.step, facts.positions_per_step),
            positions=self.step * facts.positions_per_step,
            flops=float(self.step * facts.flops_per_step),
            gpu_hours=self.gpu_hours,
        )
        self._write(metrics)
        self._progress.show_valid(metrics)

    def _write(self, metrics: Metrics) -> None:
        assert self._file is not None
        try:
            self._file.write(metrics)
        except OSError as error:
            raise UserError(
                f"--tst-run-dir: {self._path} cannot be written: {error.strerror}", own_rank=True
            ) from error

    def sync(self) -> None:
        """Wait until the metrics are on disk: a checkpoint must not be ahead of the metrics file."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the metrics file."""
        if self._file is not None:
            self._file.close()
