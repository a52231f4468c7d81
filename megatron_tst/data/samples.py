"""The datasets of the phases, whose samples megatron-core's GPTDataset takes from the phase's own documents.

Sample k of a phase is the same text for any number of ranks and any length of the run, because each epoch over a
phase's documents is a separate GPTDataset, shuffled by its own seed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_tst.config import UserError
from megatron_tst.data.cache import cached, read_array, save_array, save_folder
from megatron_tst.data.corpus import Corpus
from megatron_tst.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class DatasetSpec:
    """The properties of the samples of one phase in one corpus.

    Attributes:
        name: name that identifies the phase's documents, used for the directories of their indices.
        num_tokens: data tokens per sample, T; a sample has one more token, the last label.
        seed: seed of the order of documents and samples.
        cache: directory of cached indices.
    """

    name: str
    num_tokens: int
    seed: tuple[int, ...]
    cache: Path


@dataclass(frozen=True)
class EpochIndex:
    """The indices that megatron-core's GPTDataset builds for one epoch, mapped into memory.

    Attributes:
        document_index: the documents in reading order, ``[D]``.
        sample_index: the start of each sample as an index into ``document_index`` and a token in that document,
            ``[N + 1, 2]``.
        shuffle_index: the order of the samples, ``[N]``.
    """

    document_index: NDArray[Any]
    sample_index: NDArray[Any]
    shuffle_index: NDArray[Any]


class CorpusDataset:
    """The samples of one phase in one corpus, epoch after epoch.

    Attributes:
        samples_per_epoch: number of samples in one epoch over the phase's documents.
        epochs: the indices of every epoch.
    """

    def __init__(
        self, corpus: Corpus, documents: NDArray[numpy.int32], spec: DatasetSpec, num_samples: int, tokenizer: Tokenizer
    ) -> None:
        """Build the indices of every epoch that ``num_samples`` need.

        Collective: every rank of the world calls it; the main rank writes what is not cached yet.

        Raises:
            UserError: if the documents are too short for one sample, or the cache cannot be written.
        """
        self._corpus = corpus
        tokens = int(corpus.lengths[documents].sum(dtype=numpy.int64))
        self.samples_per_epoch = (tokens - 1) // spec.num_tokens
        if self.samples_per_epoch < 1:
            raise UserError(
                f"--data-path {corpus.prefix}: the documents of {spec.name} have {tokens} data tokens, fewer than one "
                f"sequence of {spec.num_tokens} + 1 (--seq-length x bag size + 1)"
            )
        num_epochs = max(1, -(-num_samples // self.samples_per_epoch))
        self.epochs = [_index_epoch(corpus, documents, spec, epoch, tokenizer) for epoch in range(num_epochs)]

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the text of a sample, ``[T + 1]`` in the corpus's integer type.

        The text equals ``tokens`` and the last of ``labels`` of the epoch's GPTDataset. It is read through the same
        indices, but without the masks, positions and 64-bit copies that take most of the time there.
        """
        epoch, place = divmod(int(index), self.samples_per_epoch)
        indices = self.epochs[epoch]
        shuffled = indices.shuffle_index[place]
        (first, first_offset), (last, last_offset) = indices.sample_index[shuffled : shuffled + 2].tolist()
        starts, ends = self._corpus.places(indices.document_index[first : last + 1])
        ends[-1] = starts[-1] + last_offset + 1
        starts[0] += first_offset
        tokens = self._corpus.tokens
        parts = [tokens[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return numpy.concatenate(parts)


def build_epoch(
    corpus: Corpus, documents: NDArray[numpy.int32], spec: DatasetSpec, epoch: int, tokenizer: Tokenizer, folder: Path
) -> GPTDataset:
    """Let megatron-core divide one epoch over documents into samples and write the indices into an empty directory."""
    config = GPTDatasetConfig(
        # numpy's RandomState takes a seed of 32 bits, which is drawn from everything that distinguishes this order.
        random_seed=int(numpy.random.SeedSequence((*spec.seed, epoch)).generate_state(1)[0]),
        sequence_length=spec.num_tokens,
        blend=([corpus.prefix], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return GPTDataset(corpus.indexed, corpus.prefix, documents, None, Split.train, config)


def _index_epoch(
    corpus: Corpus, documents: NDArray[numpy.int32], spec: DatasetSpec, epoch: int, tokenizer: Tokenizer
) -> EpochIndex:
    # The names that megatron-core gives cached indices do not depend on the documents; it also accepts partially
    # written files, and unpickles their content. Each dataset and epoch therefore has its own directory, which is
    # moved into place when it is complete, and read by this module.
    folder = spec.cache / f"{spec.name}-epoch{epoch}"

    def load() -> EpochIndex | None:
        """Map the indices into memory; return None if one of them is missing or damaged."""
        found = [
            read_array(path)
            for kind in ("document", "sample", "shuffle")
            for path in sorted(folder.glob(f"*-{kind}_index.npy"))
        ]
        whole = [array for array in found if array is not None]
        return EpochIndex(*whole) if len(whole) == 3 else None

    def write() -> None:
        """Build the indices in a temporary directory and move it into place."""
        save_folder(
            folder,
            lambda new: build_epoch(corpus, documents, spec, epoch, tokenizer, new),
            lambda: load() is not None,
        )

    return cached(load, write, spec.cache)


def blend_order(weights: list[float], num_samples: int, path: Path) -> NDArray[Any]:
    """Return the corpus of each sample of a blend and its index there; every prefix of the order keeps the weights.

    Collective: every rank of the world calls it; the main rank writes the order, and all map it into memory.

    Args:
        weights: weights of the corpora.
        num_samples: number of samples in the blend.
        path: file in which the order is cached.

    Returns:
        Records of ``part`` int16, the corpus, and ``index`` int64, the sample in it: ``[num_samples]``.
    """

    def write() -> None:
        """Compute and write the order."""
        part, index = numpy.zeros(num_samples, numpy.int16), numpy.zeros(num_samples, numpy.int64)
        fractions = [weight / sum(weights) for weight in weights]
        helpers.build_blending_indices(part, index, fractions, len(weights), num_samples, False)
        order = numpy.empty(num_samples, dtype=[("part", numpy.int16), ("index", numpy.int64)])
        order["part"], order["index"] = part, index
        save_array(path, order)

    return cached(lambda: read_array(path), write, path.parent)


class PhaseDataset(torch.utils.data.Dataset[NDArray[Any]]):
    """The samples of one phase, blended from its documents of all corpora.

    Attributes:
        parts: the phase's dataset of each corpus.
        order: the order of the blend, as :func:`blend_order` returns it.
    """

    def __init__(self, parts: list[CorpusDataset], order: NDArray[Any]) -> None:
        """Store the datasets and the order."""
        self.parts = parts
        self.order = order

    def __len__(self) -> int:
        """Return the number of samples in the phase."""
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the text of a sample, ``[T + 1]`` in the integer type of its corpus."""
        part, place = self.order[index]
        text: NDArray[Any] = self.parts[part][place]
        return text

    @property
    def num_epochs(self) -> float:
        """Number of epochs over the corpus that is repeated most."""
        read = numpy.bincount(self.order["part"], minlength=len(self.parts))
        return max(float(count) / part.samples_per_epoch for count, part in zip(read, self.parts, strict=True))


class RunDataset(torch.utils.data.Dataset[NDArray[Any]]):
    """The samples of all phases, with pairs of phase and index as keys, so that one dataloader serves the whole run."""

    def __init__(self, phases: list[PhaseDataset]) -> None:
        """Store the datasets of the phases."""
        self.phases = phases

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Return the text of sample ``(phase, index)``, ``[T + 1]`` in the integer type of its corpus."""
        phase, index = key
        text: NDArray[Any] = self.phases[phase][index]
        return text
