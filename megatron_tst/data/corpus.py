"""Corpora on disk: pairs of ``.bin`` and ``.idx`` files, which are checked before they are read."""

import logging
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_tst.config import UserError

logger = logging.getLogger(__name__)

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
# The fields are magic, version, dtype code, number of sequences, and number of document ends.
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_CODES = {kind.value for kind in DType if not kind.name.startswith("float")}


@dataclass(frozen=True)
class Corpus:
    """One pair of files and its weight in a blend.

    Attributes:
        prefix: path of the files without ``.bin`` or ``.idx``.
        weight: weight of the corpus, relative to the other corpora of the blend.
        indexed: megatron-core's reader of the files.
    """

    prefix: str
    weight: float
    indexed: IndexedDataset

    @property
    def file_id(self) -> tuple[int, int]:
        """Device and inode number of the ``.bin`` file, which are the same for every path to it."""
        stat = Path(f"{self.prefix}.bin").stat()
        return stat.st_dev, stat.st_ino

    @property
    def lengths(self) -> NDArray[numpy.int32]:
        """Number of data tokens of each document."""
        lengths: NDArray[numpy.int32] = self.indexed.sequence_lengths
        return lengths

    @property
    def tokens(self) -> NDArray[numpy.uint16 | numpy.int32]:
        """All data tokens, concatenated and mapped into memory; valid only as long as the corpus."""
        index = self.indexed.index
        count = index.sequence_pointers[-1] // index.dtype_size + index.sequence_lengths[-1]
        tokens: NDArray[numpy.uint16 | numpy.int32] = self.indexed.bin_reader.read(index.dtype, count, 0)
        return tokens

    def places(self, documents: NDArray[numpy.int32]) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """Return the index in ``tokens`` of the first token of each of these documents, and of one past its last."""
        starts = self.indexed.index.sequence_pointers[documents] // self.indexed.index.dtype_size
        return starts, starts + self.lengths[documents]


def open_blend(names: tuple[str, ...], flag: str) -> list[Corpus]:
    """Open the corpora of a blend.

    A corpus that is named several times, by whatever path, becomes one corpus with the sum of the weights. Each corpus
    is split among the phases separately, so the phases would otherwise share its documents.

    Args:
        names: prefixes, or alternating weights and prefixes.
        flag: the setting that names them, for messages.

    Raises:
        UserError: if the blend is malformed, or a file is missing, truncated or not megatron-core's.
    """
    if len(names) > 1 and _is_number(names[0]):
        if len(names) % 2 or not all(_is_number(weight) and 0 < float(weight) < math.inf for weight in names[::2]):
            raise UserError(f"{flag} {' '.join(names)}: must be prefixes, or alternating weights above 0 and prefixes")
        pairs = [(float(weight), prefix) for weight, prefix in zip(names[::2], names[1::2], strict=True)]
    else:
        pairs = [(1.0, prefix) for prefix in names]
    corpora: dict[tuple[int, int], Corpus] = {}
    for weight, prefix in pairs:
        corpus = Corpus(prefix, weight, _open(prefix, flag))
        first = corpora.setdefault(corpus.file_id, corpus)
        if first is not corpus:
            corpora[corpus.file_id] = summed = replace(first, weight=first.weight + weight)
            logger.info(
                "%s: %s is the same corpus as %s; their weights sum to %g", flag, prefix, first.prefix, summed.weight
            )
    return list(corpora.values())


def check_apart(train: list[Corpus], valid: list[Corpus]) -> None:
    """Check that no validation corpus is also a training corpus.

    Raises:
        UserError: if one is; the message names it.
    """
    trained_on = {corpus.file_id for corpus in train}
    for corpus in valid:
        if corpus.file_id in trained_on:
            raise UserError(
                f"--valid-data-path {corpus.prefix}: is in --train-data-path too; "
                "name another corpus, or split this one by --data-path and --split"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _open(prefix: str, flag: str) -> IndexedDataset:
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(f"{flag} {prefix}: {path} does not exist; tools/preprocess_data.py creates it")
    with idx_path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise UserError(f"{flag} {prefix}: {idx_path} is not an index of megatron-core")
    _, version, dtype_code, num_sequences, num_ends = _HEADER.unpack(head)
    if version != _VERSION or dtype_code not in _TOKEN_CODES:
        raise UserError(
            f"{flag} {prefix}: {idx_path} has version {version} and type {dtype_code}, so it is not an index of tokens"
        )
    # The index has an int32 length and an int64 offset per sequence, and an int64 end per document.
    _check_size(idx_path, _HEADER.size + 12 * num_sequences + 8 * num_ends, f"{flag} {prefix}")
    if not num_sequences:
        raise UserError(f"{flag} {prefix}: {idx_path} contains no documents")
    indexed = IndexedDataset(prefix)
    num_tokens = int(indexed.sequence_lengths.sum(dtype=numpy.int64))
    _check_size(bin_path, num_tokens * DType.size(dtype_code), f"{flag} {prefix}")
    return indexed


def _check_size(path: Path, expected: int, where: str) -> None:
    size = path.stat().st_size
    if size != expected:
        what = "truncated" if size < expected else "too long and may belong to another corpus"
        raise UserError(f"{where}: {path} is {what}: it has {size} bytes instead of {expected}")


def split_documents(split: str, num_documents: int) -> dict[str, tuple[int, int]]:
    """Return the document ranges ``[start, stop)`` of ``train``, ``valid`` and ``test`` under ``--split``.

    Args:
        split: up to three relative sizes, such as ``969,30,1``, of contiguous ranges in file order.
        num_documents: number of documents in the corpus.

    Raises:
        UserError: if the sizes are not numbers, or are negative or all zero.
    """
    sizes = split.split(",")
    if (
        len(sizes) > 3
        or not all(_is_number(size) and 0 <= float(size) < math.inf for size in sizes)
        or not sum(map(float, sizes))
    ):
        raise UserError(f"--split {split}: must be up to three relative sizes, such as 969,30,1")
    parts = numpy.array([float(size) for size in sizes] + [0.0] * (3 - len(sizes)))
    ends = [round(float(end) * num_documents) for end in numpy.cumsum(parts) / parts.sum()]
    return dict(zip(("train", "valid", "test"), zip([0, *ends[:-1]], ends, strict=True), strict=True))
