"""The dataloader: only text is sent between processes; each rank makes bags, targets and positions from it.

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

from megatron_tst.config import SuperpositionSettings, UserError
from megatron_tst.data.samples import RunDataset
from megatron_tst.distributed import ParallelState
from megatron_tst.distributed.signals import ignore_stop_signals
from megatron_tst.superposition import Phase, Schedule, bag_weights, fold_labels, fold_tokens, row_weights, slide_labels

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        inputs: int64 bags ``[B, L, S]``, or tokens ``[B, L]`` with bag size 1 or if positions read single tokens.
        labels: int64 targets ``[B, L, S]``, or ``[B, L]`` with bag size 1; ignored targets are -100.
        position_ids: int64 positions ``[B, L]``.
        weight: sum of the weights of all valid targets, a float32 scalar.
    """

    inputs: Tensor
    labels: Tensor
    position_ids: Tensor
    weight: Tensor


@dataclass(frozen=True)
class BatchShape:
    """The shape of a micro-batch and the rules by which it is made from text.

    Attributes:
        seq_length: positions per sequence, L.
        bag_size: data tokens per bag, S.
        weights: bag weights, ``[S]`` float32.
        objective: objective of the loss, ``mce`` or ``mce_alt``.
        reads_bags: whether a position reads a bag; if not, it reads one token.
        masked_after: with ``--eod-mask-loss`` the end-of-document token, whose next token is not predicted; else None.
    """

    seq_length: int
    bag_size: int
    weights: Tensor
    masked_after: int | None = None
    objective: str = "mce"
    reads_bags: bool = True

    @classmethod
    def of_phase(
        cls,
        phase: Phase,
        settings: SuperpositionSettings,
        seq_length: int,
        masked_after: int | None,
        device: torch.device,
    ) -> "BatchShape":
        """Return the shape of the batches of a phase, with its bag weights on a device."""
        return cls(
            seq_length=seq_length,
            bag_size=phase.bag_size,
            weights=bag_weights(settings.loss_weights, phase.bag_size, device),
            masked_after=masked_after,
            objective=settings.tst_objective,
            reads_bags=phase.reads_bags,
        )

    @property
    def num_tokens(self) -> int:
        """Data tokens per sequence, T."""
        return self.seq_length * (self.bag_size if self.reads_bags else 1)


def check_token_ids(text: NDArray[Any], vocab_size: int) -> None:
    """Check that all token ids are in the vocabulary.

    Raises:
        UserError: if one is not; perhaps on this rank alone.
    """
    if text.max() >= vocab_size:
        raise UserError(
            f"--data-path: contains token id {text.max()}, but the vocabulary has {vocab_size} tokens: "
            "the data was made with another tokenizer than --tokenizer-model",
            own_rank=True,
        )


def make_batch(text: Tensor, shape: BatchShape) -> Batch:
    """Make a micro-batch from text ``[B, T + 1]``: make next-token labels, then fold tokens and labels."""
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
    """Return one context-parallel rank's part of a micro-batch whose bags and targets are already made.

    The L positions are split into 2 cp chunks, and rank r takes chunks r and 2 cp - 1 - r, so that causal attention is
    the same amount of work on every rank. The weight remains that of the whole micro-batch.

    Args:
        batch: whole sequences; L must be a multiple of 2 cp.
        cp_rank: index of the part.
        cp_size: number of parts, cp.
    """

    def part(tensor: Tensor) -> Tensor:
        """Return this rank's two chunks along the position axis."""
        chunks = tensor.chunk(2 * cp_size, dim=1)
        return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=1)

    return Batch(part(batch.inputs), part(batch.labels), part(batch.position_ids), batch.weight)


class _MicroBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """Sampler that yields the keys of this rank's micro-batches, step after step.

    A step's global batch consists of the next ``global_batch_size`` samples of its phase. Micro-batch m of rank r takes
    its samples from (m dp + r) x micro-batch size on, so a step reads the same text with any number of ranks.
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
    """Dataloader that reads this rank's micro-batches of text in order, from a given step on.

    Only the first tensor-parallel rank of a stage that needs text reads the corpora; it broadcasts text to its group.
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
        """Start the worker processes.

        Args:
            text: the dataset of the run.
            schedule: the phases of the run.
            ranks: the parallel state.
            micro_batch_size: sequences per micro-batch.
            global_batch_size: sequences per step over all ranks.
            vocab_size: tokens in the vocabulary; larger ids are refused.
            num_workers: worker processes that prefetch.
            first_step: the first step to read, 0-based.
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
                # Arrays of the corpus's integer type are small, and a pipe sends them faster than shared memory does.
                collate_fn=numpy.stack,
                worker_init_fn=ignore_stop_signals,
                # The loader has its own generator, so that starting it does not change the RNG state of dropout.
                generator=torch.Generator(),
            )
            self._texts = iter(loader)

    def close(self) -> None:
        """Stop the worker processes."""
        self._texts = iter(())

    def read(self, shape: BatchShape) -> Batch:
        """Return the next micro-batch.

        Collective: every rank of the tensor-parallel group calls it.

        Raises:
            UserError: if a token id is outside the vocabulary.
        """
        num_tokens = shape.num_tokens + 1
        if self._ranks.tp_rank == 0:
            stored = next(self._texts)
            assert stored.shape == (self._micro_batch_size, num_tokens)
            check_token_ids(stored, self._vocab_size)
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
