"""The samples of each phase, as megatron-core's GPTDataset cuts them from the phase's own documents.

Sample k of a phase is the same text for any number of ranks and any length of the run: each epoch over a phase's
share is a GPTDataset of its own, shuffled by its own seed.
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
    """What the samples of one share look like.

    Attributes:
        name: identifies the share; the folders of its indices are called so.
        num_tokens: data tokens per sample, T; a sample has one token more, the last label.
        seed: of the order of documents and samples.
        cache: folder of cached indices.
    """

    name: str
    num_tokens: int
    seed: tuple[int, ...]
    cache: Path


@dataclass(frozen=True)
class EpochIndex:
    """What megatron-core's GPTDataset makes of one epoch over a share, mapped into memory.

    Attributes:
        document_index: ``[D]`` documents, in the order they are read.
        sample_index: ``[N + 1, 2]`` where each sample begins: place in ``document_index``, token in that document.
        shuffle_index: ``[N]`` the order of the samples.
    """

    document_index: NDArray[Any]
    sample_index: NDArray[Any]
    shuffle_index: NDArray[Any]


class CorpusDataset:
    """The samples of one share of one corpus, epoch after epoch.

    Attributes:
        samples_per_epoch: samples in one reading of the share.
    """

    def __init__(
        self, corpus: Corpus, documents: NDArray[numpy.int32], spec: DatasetSpec, num_samples: int, tokenizer: Tokenizer
    ) -> None:
        """Build the indices of every epoch that ``num_samples`` need.

        Collective: every rank of the world calls it; the main rank writes what is not cached yet.

        Raises:
            UserError: if the share is too small for one sample, or the cache cannot be written.
        """
        self._corpus = corpus
        tokens = int(corpus.lengths[documents].sum(dtype=numpy.int64))
        self.samples_per_epoch = (tokens - 1) // spec.num_tokens
        if self.samples_per_epoch < 1:
            raise UserError(
                f"--data-path {corpus.prefix}: the share of {spec.name} has {tokens} data tokens, fewer than one "
                f"sequence of {spec.num_tokens} + 1 (--seq-length x bag size)"
            )
        num_epochs = max(1, -(-num_samples // self.samples_per_epoch))
        self._epochs = [_index_epoch(corpus, documents, spec, epoch, tokenizer) for epoch in range(num_epochs)]

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the text of a sample, ``[T + 1]`` in the integers of the corpus.

        It is what the epoch's GPTDataset gives as ``tokens`` and the last of ``labels``, read through the same indices
        without the masks, positions and 64-bit copies that take most of the time there.
        """
        epoch, place = divmod(int(index), self.samples_per_epoch)
        indices = self._epochs[epoch]
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
    """Have megatron-core cut one epoch over a share into samples, and write the indices into an empty folder."""
    config = GPTDatasetConfig(
        # numpy's RandomState takes 32 bits: draw them from everything that tells this order from another.
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
    # megatron-core names cached indices by everything but the documents they are made from, takes a half-written file
    # for a whole one, and unpickles what it finds: each share and epoch has a folder of its own, which is moved into
    # place complete, and read here.
    folder = spec.cache / f"{spec.name}-epoch{epoch}"

    def load() -> EpochIndex | None:
        """Map the indices into memory; None where one of them is missing or damaged."""
        found = [
            read_array(path)
            for kind in ("document", "sample", "shuffle")
            for path in sorted(folder.glob(f"*-{kind}_index.npy"))
        ]
        whole = [array for array in found if array is not None]
        return EpochIndex(*whole) if len(whole) == 3 else None

    def write() -> None:
        """Build the indices in a folder beside their place, and move it there."""
        save_folder(
            folder,
            lambda new: build_epoch(corpus, documents, spec, epoch, tokenizer, new),
            lambda: load() is not None,
        )

    return cached(load, write, spec.cache)


def blend_order(weights: list[float], num_samples: int, path: Path) -> NDArray[Any]:
    """Return for each sample of a blend its corpus and its number there, keeping the weights at every point.

    Collective: every rank of the world calls it; the main rank writes the order, all map it into memory.

    Args:
        weights: of the corpora.
        num_samples: samples of the blend.
        path: where the order is kept.

    Returns:
        ``[num_samples]`` records of ``part`` int16 and ``index`` int64.
    """

    def write() -> None:
        """Draw the order."""
        part, index = numpy.zeros(num_samples, numpy.int16), numpy.zeros(num_samples, numpy.int64)
        shares = [weight / sum(weights) for weight in weights]
        helpers.build_blending_indices(part, index, shares, len(weights), num_samples, False)
        order = numpy.empty(num_samples, dtype=[("part", numpy.int16), ("index", numpy.int64)])
        order["part"], order["index"] = part, index
        save_array(path, order)

    return cached(lambda: read_array(path), write, path.parent)


class PhaseDataset(torch.utils.data.Dataset[NDArray[Any]]):
    """The samples of one phase, blended from its shares of all corpora.

    Attributes:
        parts: the phase's share of each corpus.
        order: of the blend, as :func:`blend_order` returns it.
    """

    def __init__(self, parts: list[CorpusDataset], order: NDArray[Any]) -> None:
        """Hold shares and order."""
        self.parts = parts
        self.order = order

    def __len__(self) -> int:
        """Return the samples of the phase."""
        return len(self.order)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the text of a sample, ``[T + 1]`` in the integers of its corpus."""
        part, place = self.order[index]
        text: NDArray[Any] = self.parts[part][place]
        return text

    @property
    def num_epochs(self) -> float:
        """How often the most-read corpus share is read."""
        read = numpy.bincount(self.order["part"], minlength=len(self.parts))
        return max(float(count) / part.samples_per_epoch for count, part in zip(read, self.parts, strict=True))


class RunDataset(torch.utils.data.Dataset[NDArray[Any]]):
    """The samples of all phases, named by phase and index: one loader serves the whole run."""

    def __init__(self, phases: list[PhaseDataset]) -> None:
        """Hold the phases' samples."""
        self.phases = phases

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Return the text of sample ``(phase, index)``, ``[T + 1]`` in the integers of its corpus."""
        phase, index = key
        text: NDArray[Any] = self.phases[phase][index]
        return text
