"""The samples of a run as Megatron-LM's dataloaders expect them: one dataset whose index alone determines the sample.

Sample k of the training dataset is the k-th sample that the own trainer reads. The number of consumed samples in a
checkpoint therefore determines the position in the data, the phase and the bag size to continue with.
"""

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_tst.data.batches import check_token_ids
from megatron_tst.data.samples import PhaseDataset, RunDataset
from megatron_tst.superposition import Phase, Schedule

# Every evaluation reads the validation samples from the start, and there may be any number of evaluations.
ENDLESS = 1 << 60


class TrainSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """All training samples, in the order in which they are read."""

    split = Split.train

    def __init__(
        self, text: RunDataset, schedule: Schedule, global_batch_size: int, vocab_size: int, is_read: bool
    ) -> None:
        """Store the text and its schedule.

        Args:
            text: text of each phase.
            schedule: schedule of the phases.
            global_batch_size: number of sequences per step.
            vocab_size: number of tokens of the vocabulary; larger ids are refused.
            is_read: whether this rank needs text.
        """
        self._text, self._schedule, self._batch_size = text, schedule, global_batch_size
        self._vocab_size, self._is_read = vocab_size, is_read

    def __len__(self) -> int:
        """Return the number of samples of the run."""
        return self._schedule.num_steps * self._batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``text``, ``[T + 1]`` int32, and ``phase``, its index; on a rank that needs no text, it is empty."""
        step, place = divmod(index, self._batch_size)
        point = self._schedule.phase_at(step)
        key = (point.index, point.step * self._batch_size + place)
        return _sample(self._text[key] if self._is_read else None, point.index, self._vocab_size)


class ValidSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """The validation samples, repeated endlessly: each evaluation reads all of them from the first one on."""

    split = Split.valid

    def __init__(self, text: PhaseDataset, vocab_size: int, is_read: bool) -> None:
        """Store the text.

        Args:
            text: text of one evaluation.
            vocab_size: number of tokens of the vocabulary; larger ids are refused.
            is_read: whether this rank needs text.
        """
        self._text, self._vocab_size, self._is_read = text, vocab_size, is_read

    def __len__(self) -> int:
        """Return a number that exceeds the validation samples of any run."""
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample as :class:`TrainSamples` does; its phase is -1."""
        text = self._text[index % len(self._text)] if self._is_read else None
        return _sample(text, -1, self._vocab_size)


def _sample(text: NDArray[Any] | None, phase: int, vocab_size: int) -> dict[str, Any]:
    if text is None:
        return {"text": numpy.zeros(0, numpy.int32), "phase": phase}
    check_token_ids(text, vocab_size)
    return {"text": text.astype(numpy.int32), "phase": phase}


def phase_of(micro_batch: dict[str, Any], schedule: Schedule) -> Phase:
    """Return the phase of a micro-batch's samples; that of validation samples has bag size 1."""
    number = int(micro_batch["phase"][0])
    return Phase(1, 1) if number < 0 else schedule.phases[number]


def read_step(samples: Iterator[dict[str, Any]], num_microbatches: int) -> list[dict[str, Any]]:
    """Read all micro-batches of a step."""
    return [next(samples) for _ in range(num_microbatches)]


def bytes_per_target(text: PhaseDataset, token_bytes: list[int], masked_after: int | None) -> float | None:
    """Return the average number of bytes of text per target of these samples; None if there are no bytes.

    Args:
        text: samples with bag size 1.
        token_bytes: bytes of text of each token id.
        masked_after: token after which the target is masked, or None.
    """
    sizes, num_targets, num_bytes = numpy.array(token_bytes), 0, 0
    for index in range(len(text)):
        row = text[index]
        targets = row[1:] if masked_after is None else row[1:][row[:-1] != masked_after]
        num_targets += len(targets)
        num_bytes += int(sizes[targets].sum())
    return num_bytes / num_targets if num_bytes else None
