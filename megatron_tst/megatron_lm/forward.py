"""The forward step that Megatron-LM's schedules call, with a loss that is exact for any masking.

The loss of a step is the sum of all row losses divided by the sum of all target weights, both over all micro-batches
and data-parallel ranks, as in the own trainer. A step's text is read before its first forward pass, so the global
weight is known when the first loss is divided by it.

Shape letters: B sequences, L positions, P = L / cp positions of this context-parallel rank.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_tst.data.batches import Batch, BatchShape, make_batch, slice_for_context_parallel
from megatron_tst.distributed import ParallelState
from megatron_tst.megatron_lm.samples import phase_of, read_step
from megatron_tst.superposition import Phase, Schedule

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a global batch and its parts.

    Attributes:
        num_microbatches: number of micro-batches of each rank.
        num_positions: number of positions of the whole batch, over all ranks.
    """

    num_microbatches: int
    num_positions: int


@dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch and the quantities that scale its loss.

    Attributes:
        batch: batch of this rank; None on pipeline stages that need no text.
        global_weight: total weight of all valid targets of the step; None on stages that compute no loss.
        num_positions: number of positions of the step, over all ranks.
    """

    batch: Batch | None
    global_weight: Tensor | None
    num_positions: int


class ForwardStep:
    """Turns text into batches and runs them through the model; this is Megatron-LM's ``forward_step_func``."""

    def __init__(
        self,
        schedule: Schedule,
        ranks: ParallelState,
        batch_shape: Callable[[Phase], BatchShape],
        sizes: Callable[[bool], StepSizes],
        check: Callable[[Tensor], None],
    ) -> None:
        """Store the parts of a run that the forward step uses.

        Args:
            schedule: schedule of the phases.
            ranks: parallel state of this rank.
            batch_shape: function from a phase to the shape of its batches.
            sizes: function from whether the model is training to the current sizes of the global batch.
            check: function that checks the row losses of training, for example that they are finite.
        """
        self._schedule, self._ranks = schedule, ranks
        self._batch_shape, self._sizes, self._check = batch_shape, sizes, check
        # Micro-batches that were read ahead, by iterator; each chunk of an interleaved pipeline has its own iterator.
        self._waiting: dict[int, deque[_MicroBatch]] = {}

    def __call__(self, samples: Iterator[dict[str, Any]], model: torch.nn.Module, *_: Any) -> tuple[Tensor, Any]:
        """Return the model's output for the next micro-batch, and the function that turns it into a loss.

        Collective: on the stage that computes the loss, every rank of the data-parallel group calls it.
        """
        micro_batch = self._next(samples, model)
        batch = micro_batch.batch
        inputs = (None, None, None, None) if batch is None else (batch.inputs, batch.position_ids, None, batch.labels)
        input_ids, position_ids, attention_mask, labels = inputs
        output = model(input_ids, position_ids, attention_mask, labels=labels)
        return output, partial(self._loss, micro_batch=micro_batch, is_training=model.training)

    def _next(self, samples: Iterator[dict[str, Any]], model: torch.nn.Module) -> _MicroBatch:
        waiting = self._waiting.setdefault(id(samples), deque())
        if not waiting:
            waiting.extend(self._read(samples, model))
        return waiting.popleft()

    def _read(self, samples: Iterator[dict[str, Any]], model: torch.nn.Module) -> Iterator[_MicroBatch]:
        """Read the micro-batches of a step and sum the weights of its targets over the ranks."""
        sizes = self._sizes(model.training)
        read = read_step(samples, sizes.num_microbatches)
        is_first, is_last = (get_attr_wrapped_model(model, name) for name in ("pre_process", "post_process"))
        if not (is_first or is_last):
            return iter([_MicroBatch(None, None, sizes.num_positions)] * len(read))
        batches = [self._make(part) for part in read]
        weight = None
        if is_last:
            weight = torch.stack([batch.weight for batch in batches]).sum()
            dist.all_reduce(weight, group=self._ranks.groups.dp)
        return iter([_MicroBatch(batch, weight, sizes.num_positions) for batch in batches])

    def _make(self, micro_batch: dict[str, Any]) -> Batch:
        text = micro_batch["text"].to(torch.cuda.current_device(), non_blocking=True).long()
        batch = make_batch(text, self._batch_shape(phase_of(micro_batch, self._schedule)))
        if self._ranks.cp_size == 1:
            return batch
        return slice_for_context_parallel(batch, self._ranks.cp_rank, self._ranks.cp_size)

    def _loss(
        self, row_loss_BP: Tensor, micro_batch: _MicroBatch, is_training: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss to differentiate, its number of positions, and the values to report.

        Megatron-LM divides a loss by its number of positions, an integer, and averages over micro-batches and ranks, or
        it sums and divides by all positions (--calculate-per-token-loss). Since the loss is multiplied by the positions
        of the whole step, the result in both cases is this micro-batch's part of the step's loss.
        """
        assert micro_batch.global_weight is not None
        if is_training:
            self._check(row_loss_BP)
        # A step without any valid target has loss 0, not 0 / 0.
        part = row_loss_BP.sum() / micro_batch.global_weight.clamp(min=_TINY) * micro_batch.num_positions
        positions = torch.tensor(row_loss_BP.numel(), dtype=torch.int, device=part.device)
        return part, positions, {"lm loss": torch.stack((part.detach(), positions.float()))}
