"""From samples to micro-batches: text travels, and bags, targets and positions are made from it on the spot.

Shape letters: B sequences, T data tokens, S bag size, L = T / S positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tst.config import UserError
from megatron_tst.data.samples import RunDataset
from megatron_tst.distributed import ParallelState
from megatron_tst.distributed.signals import ignore_stop_signals
from megatron_tst.superposition import Schedule, fold_labels, fold_tokens, row_weights, slide_labels

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        inputs: bags ``[B, L, S]``, or tokens ``[B, L]`` with bag size 1 or where single tokens are read; int64.
        labels: targets ``[B, L, S]``, or ``[B, L]`` with bag size 1; -100 where ignored.
        position_ids: ``[B, L]`` int64.
        weight: float32 scalar, the weight of all valid targets.
    """

    inputs: Tensor
    labels: Tensor
    position_ids: Tensor
    weight: Tensor


@dataclass(frozen=True)
class BatchShape:
    """What a micro-batch of text is turned into.

    Attributes:
        seq_length: positions, L.
        bag_size: S.
        weights: ``[S]`` float32 bag weights.
        objective: of the loss, ``mce`` or ``mce_alt``.
        reads_bags: whether a position reads a bag, or one token.
        masked_after: with ``--eod-mask-loss`` the end-of-document token, after which nothing is predicted; else None.
    """

    seq_length: int
    bag_size: int
    weights: Tensor
    masked_after: int | None = None
    objective: str = "mce"
    reads_bags: bool = True

    @property
    def num_tokens(self) -> int:
        """Data tokens per sequence, T."""
        return self.seq_length * (self.bag_size if self.reads_bags else 1)


def make_batch(text: Tensor, shape: BatchShape) -> Batch:
    """Turn text ``[B, T + 1]`` into a micro-batch: next-token labels first, then both sides folded."""
    tokens, labels = text[:, :-1], text[:, 1:]
    if shape.masked_after is not None:
        labels = labels.masked_fill(tokens == shape.masked_after, IGNORE_INDEX)
    if shape.reads_bags:
        bags, targets = fold_tokens(tokens, shape.bag_size), fold_labels(labels, shape.bag_size, IGNORE_INDEX)
    else:
        bags, targets = tokens, slide_labels(labels, shape.bag_size, IGNORE_INDEX)
    weight = row_weights(shape.objective, targets, shape.weights, IGNORE_INDEX).sum()
    if shape.bag_size == 1:
        bags, targets = bags.view(tokens.shape), targets.squeeze(-1)
    positions = torch.arange(shape.seq_length, device=text.device).expand(text.shape[0], -1)
    return Batch(bags, targets, positions, weight)


def slice_for_context_parallel(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """Return one context-parallel rank's part of a micro-batch, bags and targets already made.

    The L positions are cut into 2 cp chunks and rank r takes chunks r and 2 cp - 1 - r, so that causal attention gives
    every rank the same work. The weight stays that of the whole micro-batch.

    Args:
        batch: whole sequences; L must be a multiple of 2 cp.
        cp_rank: which part.
        cp_size: in how many.
    """

    def part(tensor: Tensor) -> Tensor:
        """Take this rank's two chunks of the position axis."""
        chunks = tensor.chunk(2 * cp_size, dim=1)
        return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=1)

    return Batch(part(batch.inputs), part(batch.labels), part(batch.position_ids), batch.weight)


class _MicroBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """The keys of this rank's micro-batches, step after step.

    A step's global batch is the next ``global_batch_size`` samples of its phase; micro-batch m of rank r takes the
    samples from (m dp + r) x micro-batch size on. So a step reads the same text for any number of ranks.
    """

    def __init__(
        self, schedule: Schedule, first_step: int, micro_batch_size: int, global_batch_size: int, ranks: ParallelState
    ) -> None:
        self.schedule, self.first_step, self.ranks = schedule, first_step, ranks
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, stride = self.micro_batch_size, self.micro_batch_size * self.ranks.dp_size
        for step in range(self.first_step, self.schedule.num_steps):
            point = self.schedule.phase_at(step)
            start = point.step * self.global_batch_size + self.ranks.dp_rank * size
            for first in range(start, (point.step + 1) * self.global_batch_size, stride):
                yield [(point.index, index) for index in range(first, first + size)]


class BatchLoader:
    """Reads this rank's micro-batches of text, from one step on, in order.

    Only the first tensor-parallel rank of a stage that owns text opens the corpora; it hands the text to its group.
    """

    def __init__(
        self,
        text: RunDataset,
        schedule: Schedule,
        ranks: ParallelState,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        vocab_size: int,
        num_workers: int = 0,
        first_step: int = 0,
    ) -> None:
        """Start reading.

        Args:
            text: the samples.
            schedule: which phase each step belongs to.
            ranks: this rank's place.
            micro_batch_size: sequences per micro-batch.
            global_batch_size: sequences per step over all ranks.
            vocab_size: tokens of the vocabulary; larger ids are refused.
            num_workers: processes that read ahead.
            first_step: step to read first.
        """
        self._ranks, self._vocab_size, self._micro_batch_size = ranks, vocab_size, micro_batch_size
        self._device = torch.device(torch.cuda.current_device())
        self._texts: Iterator[NDArray[Any]] = iter(())
        if ranks.owns_text and ranks.tp_rank == 0:
            sampler = _MicroBatches(schedule, first_step, micro_batch_size, global_batch_size, ranks)
            loader = torch.utils.data.DataLoader(
                text,
                batch_sampler=sampler,
                num_workers=num_workers,
                # Arrays in the corpus's integers: less to send, and through a pipe sooner than in shared memory.
                collate_fn=numpy.stack,
                worker_init_fn=ignore_stop_signals,
                # Its own generator: to start reading must not move the one that dropout draws from.
                generator=torch.Generator(),
            )
            self._texts = iter(loader)

    def close(self) -> None:
        """Stop the processes that read ahead."""
        self._texts = iter(())

    def read(self, shape: BatchShape) -> Batch:
        """Return the next micro-batch.

        Collective: every rank of the tensor-parallel group calls it.

        Raises:
            UserError: if a token id lies beyond the vocabulary.
        """
        num_tokens = shape.num_tokens + 1
        if self._ranks.tp_rank == 0:
            stored = next(self._texts)
            assert stored.shape == (self._micro_batch_size, num_tokens)
            if stored.max() >= self._vocab_size:
                raise UserError(
                    f"--data-path: holds token id {stored.max()}, but the vocabulary has {self._vocab_size}: "
                    "the data was made with another tokenizer than --tokenizer-model",
                    own_rank=True,
                )
            text = torch.from_numpy(stored.astype(numpy.int32))
            if self._device.type == "cuda":
                text = text.pin_memory()
            text = text.to(self._device, non_blocking=True)
        else:
            text = torch.empty(self._micro_batch_size, num_tokens, dtype=torch.int32, device=self._device)
        if self._ranks.tp_size > 1:
            group = self._ranks.groups.tp
            dist.broadcast(text, dist.get_global_rank(group, 0), group=group)
        batch = make_batch(text.long(), shape)
        if self._ranks.cp_size == 1:
            return batch
        return slice_for_context_parallel(batch, self._ranks.cp_rank, self._ranks.cp_size)
