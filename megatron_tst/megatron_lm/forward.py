"""The forward step that Megatron-LM's schedules call, with a loss that is exact whatever is masked.

The loss of a step is the sum of all row losses over the sum of all target weights, over micro-batches and
data-parallel ranks alike, as in the own trainer. A step's text is read before its first forward pass, so the global
weight is known when the first loss is divided by it.

Shape letters: B sequences, L positions, P = L / cp of them on this context-parallel rank.
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
    """How a global batch is cut.

    Attributes:
        num_microbatches: of each rank.
        num_positions: of the whole batch, over all ranks.
    """

    num_microbatches: int
    num_positions: int


@dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch and what its loss is divided by.

    Attributes:
        batch: of this rank; None on stages that own no text.
        global_weight: of all valid targets of the step; None where no loss is computed.
        num_positions: of the step, over all ranks.
    """

    batch: Batch | None
    global_weight: Tensor | None
    num_positions: int


class ForwardStep:
    """Makes batches of text and runs them through the model; Megatron-LM's ``forward_step_func``."""

    def __init__(
        self,
        schedule: Schedule,
        ranks: ParallelState,
        batch_shape: Callable[[Phase], BatchShape],
        sizes: Callable[[bool], StepSizes],
        check: Callable[[Tensor], None],
    ) -> None:
        """Tie it to a run.

        Args:
            schedule: the phases.
            ranks: this rank's place.
            batch_shape: what text is turned into in a phase.
            sizes: how the global batch is cut now, given whether the model trains.
            check: looks at each row of losses of training, such as for one that is not finite.
        """
        self._schedule, self._ranks = schedule, ranks
        self._batch_shape, self._sizes, self._check = batch_shape, sizes, check
        # What was read ahead, by the iterator it is from: each chunk of an interleaved pipeline has its own.
        self._waiting: dict[int, deque[_MicroBatch]] = {}

    def __call__(self, samples: Iterator[dict[str, Any]], model: torch.nn.Module, *_: Any) -> tuple[Tensor, Any]:
        """Return the model's output for the next micro-batch, and the function that makes a loss of it.

        Collective: every rank of the data-parallel group calls it where the loss is computed.
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
        """Read a step and weigh it."""
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
        """Return the loss to differentiate, the positions it is of, and what is reported.

        Megatron-LM divides a loss by the positions, an integer, and averages over micro-batches and ranks, or sums and
        divides by all positions (--calculate-per-token-loss). Times the positions of the whole step, either leaves
        this micro-batch's part of the step's loss.
        """
        assert micro_batch.global_weight is not None
        if is_training:
            self._check(row_loss_BP)
        # A step without any valid target has loss 0, not 0 / 0.
        part = row_loss_BP.sum() / micro_batch.global_weight.clamp(min=_TINY) * micro_batch.num_positions
        positions = torch.tensor(row_loss_BP.numel(), dtype=torch.int, device=part.device)
        return part, positions, {"lm loss": torch.stack((part.detach(), positions.float()))}
