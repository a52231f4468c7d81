"""One optimizer step, and one evaluation, through megatron-core's pipeline schedules."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tst.checkpoint.content import TrainState
from megatron_tst.data.batches import Batch
from megatron_tst.telemetry.run_metrics import StepTimes, learning_rates


@dataclass(frozen=True)
class StepReport:
    """The result of one optimizer step.

    Attributes:
        loss: float32 scalar, the global loss sum over the global weight; the same on every rank.
        grad_norm: global gradient norm before clipping.
        lr_by_group: learning rate of each parameter group.
        is_applied: whether the weights were updated; False if the loss or the gradient norm is not finite.
        times: times of the step's parts.
    """

    loss: Tensor
    grad_norm: float
    lr_by_group: dict[str, float]
    is_applied: bool
    times: StepTimes


# Names of megatron-core's timers around gradient reductions and parameter gathers.
_REDUCTIONS = ("all-grads-sync", "non-tensor-parallel-grads-all-reduce", "embedding-grads-all-reduce")
_GATHERS = ("params-all-gather",)


def _connect(chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, timers: Timers) -> None:
    """Tell megatron-core's schedules how these chunks reduce gradients and gather parameters, and set its timers."""
    config, ddp_config = get_model_config(chunks[0]), chunks[0].ddp_config
    for timed in (config, *(part.config for part in optimizer.chained_optimizers)):
        timed.timers, timed.barrier_with_L1_time = timers, False

    def one_or_all(name: str) -> Any:
        """Return a method of the only chunk, or a list with the methods of all chunks."""
        methods = [getattr(chunk, name) for chunk in chunks]
        return methods if len(methods) > 1 else methods[0]

    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        # All micro-batches but the last only accumulate; all pipeline stages start to reduce at the same time.
        config.no_sync_func = one_or_all("no_sync")
        config.grad_sync_func = one_or_all("start_grad_sync")
    if ddp_config.align_param_gather:
        config.param_sync_func = one_or_all("start_param_sync")


class Stepper:
    """Runs micro-batches through the model and steps the optimizer.

    The loss is the sum of all row losses over the sum of all target weights, over micro-batches and data-parallel
    ranks alike. A step's text is read before its first forward pass, so the global weight is known when the first
    loss is divided by it.
    """

    def __init__(
        self,
        train_state: TrainState,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
    ) -> None:
        """Connect model and optimizer.

        Args:
            train_state: model, optimizer and learning-rate schedule.
            seq_length: number of positions per sequence, the same in every phase.
            micro_batch_size: number of sequences per micro-batch.
            global_batch_size: number of sequences per step over all ranks.
        """
        self.train_state, self._ranks = train_state, train_state.ranks
        chunks, ranks = train_state.chunks, train_state.ranks
        self.micro_batch_size = micro_batch_size
        self.num_microbatches = global_batch_size // (micro_batch_size * ranks.dp_size)
        self._global_batch_size = global_batch_size
        self._schedule = partial(
            get_forward_backward_func(),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=self.num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
        )
        self._timers = Timers(log_level=1, log_option="max")
        _connect(chunks, train_state.optimizer, self._timers)

    def train(self, batches: list[Batch | None]) -> StepReport:
        """Take one optimizer step over this rank's micro-batches, which are None on stages without text.

        Collective: every rank of the world calls it.
        """
        started_s = time.perf_counter()
        optimizer = self.train_state.optimizer
        for chunk in self.train_state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = self.forward_backward(batches, forward_only=False)
        lr_by_group = learning_rates(optimizer.param_groups)
        is_applied, grad_norm = False, math.nan
        is_finite = bool(torch.isfinite(loss))  # waits for the device, so the time so far is that of the passes
        passed_s = time.perf_counter()
        reduced_s = self._elapsed(_REDUCTIONS)
        if is_finite:
            is_applied, grad_norm, _ = optimizer.step()
        # The schedule counts skipped steps too, so the learning rate depends only on the step.
        self.train_state.scheduler.step(increment=self._global_batch_size)
        updated_s, gathered_s = time.perf_counter() - passed_s, self._elapsed(_GATHERS)
        return StepReport(
            loss=loss,
            grad_norm=float(grad_norm),
            lr_by_group=lr_by_group,
            is_applied=is_applied,
            times=StepTimes(
                forward_backward_s=passed_s - started_s - reduced_s,
                optimizer_s=updated_s - gathered_s,
                communication_s=reduced_s + gathered_s,
            ),
        )

    def _elapsed(self, names: tuple[str, ...]) -> float:
        """Return the seconds that these timers counted since they were last read."""
        return float(sum(self._timers(name, log_level=1).elapsed() for name in names))

    def evaluate(self, batches: list[Batch | None]) -> Tensor:
        """Return the loss of one global batch, computed without gradients; it is the same on every rank.

        Collective: every rank of the world calls it.
        """
        for chunk in self.train_state.chunks:
            chunk.eval()
        with torch.no_grad():
            return self.forward_backward(batches, forward_only=True)

    def forward_backward(self, batches: list[Batch | None], forward_only: bool) -> Tensor:
        """Run the micro-batches of one global batch through the model; return its loss, the same on every rank.

        Collective: every rank of the world calls it.
        """
        global_weight = self.global_weight(batches)
        losses: list[Tensor] = self._schedule(
            forward_step_func=partial(self._forward, global_weight=global_weight),
            data_iterator=[iter(batches) for _ in self.train_state.chunks],
            forward_only=forward_only,
        )
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=torch.cuda.current_device())
        groups = self._ranks.groups
        if self._ranks.is_last_stage:
            dist.all_reduce(loss, group=groups.dp_cp)
        if groups.pp.size() > 1:
            dist.broadcast(loss, self._ranks.last_stage_rank, group=groups.pp)
        return loss

    def global_weight(self, batches: list[Batch | None]) -> Tensor:
        """Return the weight of all valid targets of the step; the value is meaningful on the last pipeline stage."""
        weights = [batch.weight for batch in batches if batch is not None]
        weight = torch.stack(weights).sum() if weights else torch.zeros((), device=torch.cuda.current_device())
        if self._ranks.is_last_stage:
            dist.all_reduce(weight, group=self._ranks.groups.dp)
        return weight

    def _forward(self, batches: Iterator[Batch | None], model: torch.nn.Module, global_weight: Tensor) -> Any:
        batch = next(batches)
        inputs = (None, None, None, None) if batch is None else (batch.inputs, batch.position_ids, None, batch.labels)
        input_ids, position_ids, attention_mask, labels = inputs
        output = model(input_ids, position_ids, attention_mask, labels=labels)
        return output, partial(self.micro_batch_loss, global_weight=global_weight)

    def micro_batch_loss(self, row_loss_BL: Tensor, global_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss to differentiate and this micro-batch's part of the step's loss.

        megatron-core averages over micro-batches and data-parallel ranks; the factor here turns the averages into sums.
        """
        # The clamp makes the loss of a batch without any valid target 0 instead of 0 / 0.
        part = row_loss_BL.sum() / global_weight.clamp(min=torch.finfo(torch.float32).tiny)
        return part * (self.num_microbatches * self._ranks.dp_size), part.detach()
