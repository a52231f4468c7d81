"""Corpora on disk: pairs of ``.bin`` and ``.idx`` files, checked before they are read."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_tst.config import UserError

_MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, number of document ends.
_HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True)
class Corpus:
    """One pair of files and how much it counts in a blend.

    Attributes:
        prefix: path without ``.bin`` or ``.idx``.
        weight: share of the samples, relative to the other corpora of the blend.
        indexed: megatron-core's reader of it.
    """

    prefix: str
    weight: float
    indexed: IndexedDataset

    @property
    def lengths(self) -> NDArray[numpy.int32]:
        """Data tokens of each document."""
        lengths: NDArray[numpy.int32] = self.indexed.sequence_lengths
        return lengths

    @property
    def tokens(self) -> NDArray[numpy.uint16 | numpy.int32]:
        """All data tokens end to end, mapped into memory; not to be kept longer than the corpus."""
        index = self.indexed.index
        count = index.sequence_pointers[-1] // index.dtype_size + index.sequence_lengths[-1]
        tokens: NDArray[numpy.uint16 | numpy.int32] = self.indexed.bin_reader.read(index.dtype, count, 0)
        return tokens

    def places(self, documents: NDArray[numpy.int32]) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """Return where each of these documents begins in ``tokens``, and one past its end."""
        starts = self.indexed.index.sequence_pointers[documents] // self.indexed.index.dtype_size
        return starts, starts + self.lengths[documents]


def open_blend(names: tuple[str, ...], flag: str) -> list[Corpus]:
    """Open the corpora of a blend.

    Args:
        names: prefixes, or weight and prefix in turn.
        flag: which setting named them, for messages.

    Raises:
        UserError: if the blend is malformed, or a file is missing, truncated or not megatron-core's.
    """
    if len(names) > 1 and _is_number(names[0]):
        if len(names) % 2 or not all(_is_number(weight) and float(weight) > 0 for weight in names[::2]):
            raise UserError(f"{flag} {' '.join(names)}: must be prefixes, or weights above 0 and prefixes in turn")
        pairs = [(float(weight), prefix) for weight, prefix in zip(names[::2], names[1::2], strict=True)]
    else:
        pairs = [(1.0, prefix) for prefix in names]
    return [Corpus(prefix, weight, _open(prefix, flag)) for weight, prefix in pairs]


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
            raise UserError(f"{flag} {prefix}: {path} does not exist; tools/preprocess_data.py makes it")
    with idx_path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise UserError(f"{flag} {prefix}: {idx_path} is not an index of megatron-core")
    _, _, dtype_code, num_sequences, num_ends = _HEADER.unpack(head)
    # Per sequence an int32 length and an int64 offset, per document an int64 end.
    idx_size = _HEADER.size + 12 * num_sequences + 8 * num_ends
    if idx_path.stat().st_size < idx_size:
        raise UserError(
            f"{flag} {prefix}: {idx_path} is truncated: {idx_path.stat().st_size} bytes, {idx_size} expected"
        )
    if not num_sequences:
        raise UserError(f"{flag} {prefix}: {idx_path} holds no documents")
    indexed = IndexedDataset(prefix)
    bin_size = int(indexed.sequence_lengths.sum(dtype=numpy.int64)) * DType.size(dtype_code)
    if bin_path.stat().st_size < bin_size:
        raise UserError(
            f"{flag} {prefix}: {bin_path} is truncated: {bin_path.stat().st_size} bytes, {bin_size} expected"
        )
    return indexed


def split_documents(split: str, num_documents: int) -> dict[str, tuple[int, int]]:
    """Return the document ranges ``[start, stop)`` of ``train``, ``valid`` and ``test``, as ``--split`` cuts them.

    Args:
        split: up to three shares, such as ``969,30,1``; contiguous ranges in file order.
        num_documents: documents of the corpus.

    Raises:
        UserError: if the shares are not numbers, negative, or all zero.
    """
    shares = split.split(",")
    if (
        len(shares) > 3
        or not all(_is_number(share) and float(share) >= 0 for share in shares)
        or not sum(map(float, shares))
    ):
        raise UserError(f"--split {split}: must be up to three shares, such as 969,30,1")
    parts = numpy.array([float(share) for share in shares] + [0.0] * (3 - len(shares)))
    ends = [round(float(end) * num_documents) for end in numpy.cumsum(parts) / parts.sum()]
    return dict(zip(("train", "valid", "test"), zip([0, *ends[:-1]], ends, strict=True), strict=True))
