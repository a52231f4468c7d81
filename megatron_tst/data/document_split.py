"""Splits a corpus's documents among the phases, so that no phase reads another's text.

The documents are permuted by the seed and split where the phases' token budgets say. This is done block by block: it
takes the memory of one block beside the result, and time linear in the number of documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

BLOCK_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class DocumentSplit:
    """How one corpus of a blend is split: with the seed, all that the samples of every phase follow from.

    Attributes:
        prefix: path of its files, without the ending.
        weight: its weight in the blend.
        documents: first document that the phases read, and one past the last.
        fingerprint: identifies the corpus, wherever it lies.
        token_budgets: data tokens that each phase owns.
    """

    prefix: str
    weight: float
    documents: tuple[int, int]
    fingerprint: str
    token_budgets: tuple[int, ...]

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "DocumentSplit":
        """Read what a checkpoint keeps; before version 0.2 the token budgets were called ``quotas``."""
        budgets = saved["token_budgets"] if "token_budgets" in saved else saved["quotas"]
        start, stop = saved["documents"]
        return cls(saved["prefix"], saved["weight"], (start, stop), saved["fingerprint"], tuple(budgets))

    def is_of(self, other: "DocumentSplit") -> bool:
        """Return whether the other splits the same documents, with the same weight in the blend."""
        facts = [(split.weight, split.documents, split.fingerprint) for split in (self, other)]
        return facts[0] == facts[1]


@dataclass(frozen=True)
class PhaseDocuments:
    """The documents of one phase.

    Attributes:
        documents: ids, int32.
        num_tokens: data tokens they hold.
    """

    documents: NDArray[numpy.int32]
    num_tokens: int


def token_budgets(wanted: list[int], num_tokens: int, longest: int) -> list[int]:
    """Return how many data tokens each phase owns.

    A corpus that is large enough gives each phase what it wants and one document more, and all the rest to the last
    phase: a run that is prolonged finds new text there, and its earlier phases keep theirs. A smaller corpus is split
    in proportion, and each phase reads its own documents more than once.

    Args:
        wanted: data tokens that each phase is going to read.
        num_tokens: data tokens of the corpus.
        longest: data tokens of the longest document, which no split can divide.
    """
    spared = [budget + longest for budget in wanted[:-1]]
    if sum(spared) + wanted[-1] <= num_tokens:
        return [*spared, num_tokens - sum(spared)]
    parts = [num_tokens * budget // sum(wanted) for budget in wanted[:-1]]
    return [*parts, num_tokens - sum(parts)]


def split_into_phases(
    lengths: NDArray[numpy.int32], start: int, stop: int, budgets: list[int], seed: int
) -> list[PhaseDocuments]:
    """Assign the documents ``start .. stop`` to the phases at random, up to each phase's token budget.

    Every document belongs to exactly one phase. Each block of documents is split in proportion to the budgets, less
    what earlier blocks assigned in excess, so a phase's documents meet its budget to within one document.

    Args:
        lengths: data tokens of each document of the corpus; may be a memory map.
        start: first document to assign.
        stop: one past the last.
        budgets: of each phase, summing to the data tokens of these documents.
        seed: of the permutation.
    """
    bounds = numpy.cumsum(budgets[:-1], dtype=numpy.float64) / max(sum(budgets), 1)
    assigned = numpy.zeros(len(budgets) - 1, dtype=numpy.int64)
    parts: list[list[NDArray[numpy.int32]]] = [[] for _ in budgets]
    tokens = [0] * len(budgets)
    seen = 0
    for block, first in enumerate(range(start, stop, BLOCK_DOCUMENTS)):
        last = min(first + BLOCK_DOCUMENTS, stop)
        order = numpy.random.default_rng((seed, block)).permutation(last - first)
        ends = numpy.cumsum(lengths[first:last][order], dtype=numpy.int64)
        seen += int(ends[-1])
        due = bounds * seen - assigned
        # A document that crosses a boundary belongs to the phase before it.
        cuts = numpy.where(due > 0, numpy.searchsorted(ends, due) + 1, 0)
        cuts = numpy.maximum.accumulate(numpy.minimum(cuts, last - first))
        assigned += numpy.where(cuts > 0, ends[cuts - 1], 0)
        documents = (order + first).astype(numpy.int32)
        for phase, part in enumerate(numpy.split(documents, cuts)):
            parts[phase].append(part)
            tokens[phase] += int(lengths[part].sum(dtype=numpy.int64))
    return [
        PhaseDocuments(numpy.concatenate(part) if part else numpy.empty(0, numpy.int32), count)
        for part, count in zip(parts, tokens, strict=True)
    ]
