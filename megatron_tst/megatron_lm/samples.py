"""The samples of a run as Megatron-LM's loaders want them: one dataset whose index alone says what is read.

Sample k of training is the sample that the own trainer reads k-th, so the samples that a checkpoint has consumed say
where to go on, in which phase and with which bag size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_tst.config import UserError
from megatron_tst.data.samples import PhaseDataset, RunDataset
from megatron_tst.superposition import Phase, Schedule

# Validation is read from its start at every evaluation, as often as there are any.
ENDLESS = 1 << 60


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens there may be.

    Attributes:
        size: of the vocabulary; larger ids are refused.
    """

    size: int

    def check(self, text: NDArray[Any]) -> None:
        """Refuse text of another vocabulary.

        Raises:
            UserError: if a token id lies beyond it.
        """
        if text.max() >= self.size:
            raise UserError(
                f"--data-path: holds token id {text.max()}, but the vocabulary has {self.size}: the data was made with "
                "another tokenizer than --tokenizer-model",
                own_rank=True,
            )


class TrainSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """All samples of training, in the order they are read."""

    split = Split.train

    def __init__(
        self, text: RunDataset, schedule: Schedule, global_batch_size: int, vocabulary: Vocabulary, is_read: bool
    ) -> None:
        """Hold the text.

        Args:
            text: of each phase.
            schedule: the phases.
            global_batch_size: sequences per step.
            vocabulary: which tokens there may be.
            is_read: whether this rank needs text at all.
        """
        self._text, self._schedule, self._batch_size = text, schedule, global_batch_size
        self._vocabulary, self._is_read = vocabulary, is_read

    def __len__(self) -> int:
        """Return the samples of the run."""
        return self._schedule.num_steps * self._batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``text``, ``[T + 1]`` int32, and ``phase``, its number; a rank that needs no text gets none."""
        step, place = divmod(index, self._batch_size)
        point = self._schedule.phase_at(step)
        key = (point.index, point.step * self._batch_size + place)
        return _sample(self._text[key] if self._is_read else None, point.index, self._vocabulary)


class ValidSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """The validation samples over and over: each evaluation reads all of them from the first on."""

    split = Split.valid

    def __init__(self, text: PhaseDataset, vocabulary: Vocabulary, is_read: bool) -> None:
        """Hold the text.

        Args:
            text: of one evaluation.
            vocabulary: which tokens there may be.
            is_read: whether this rank needs text at all.
        """
        self._text, self._vocabulary, self._is_read = text, vocabulary, is_read

    def __len__(self) -> int:
        """Return more samples than any run evaluates on."""
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample as :class:`TrainSamples` does; its phase is -1."""
        text = self._text[index % len(self._text)] if self._is_read else None
        return _sample(text, -1, self._vocabulary)


def _sample(text: NDArray[Any] | None, phase: int, vocabulary: Vocabulary) -> dict[str, Any]:
    if text is None:
        return {"text": numpy.zeros(0, numpy.int32), "phase": phase}
    vocabulary.check(text)
    return {"text": text.astype(numpy.int32), "phase": phase}


def phase_of(micro_batch: dict[str, Any], schedule: Schedule) -> Phase:
    """Return the phase that the samples of a micro-batch belong to: ordinary tokens where it is validation."""
    number = int(micro_batch["phase"][0])
    return Phase(1, 1) if number < 0 else schedule.phases[number]


def read_step(samples: Iterator[dict[str, Any]], num_microbatches: int) -> list[dict[str, Any]]:
    """Read all micro-batches of a step."""
    return [next(samples) for _ in range(num_microbatches)]


def bytes_per_target(text: PhaseDataset, token_bytes: list[int], masked_after: int | None) -> float | None:
    """Return the bytes of text that a target of these samples stands for on average; None where there are none.

    Args:
        text: ordinary samples.
        token_bytes: of each id.
        masked_after: the token after which nothing is predicted, or None.
    """
    sizes, num_targets, num_bytes = numpy.array(token_bytes), 0, 0
    for index in range(len(text)):
        row = text[index]
        targets = row[1:] if masked_after is None else row[1:][row[:-1] != masked_after]
        num_targets += len(targets)
        num_bytes += int(sizes[targets].sum())
    return num_bytes / num_targets if num_bytes else None
