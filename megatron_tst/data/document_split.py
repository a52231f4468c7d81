"""Split a corpus's documents among the phases, so that no phase reads another phase's text.

The documents are permuted by the seed and split by the phases' token budgets. This is done block by block: it needs
memory for one block besides the result, and time linear in the number of documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

BLOCK_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class DocumentSplit:
    """The split of one corpus of a blend, which together with the seed determines the samples of every phase.

    Attributes:
        prefix: path of the corpus's files without their suffix.
        weight: weight of the corpus in the blend.
        documents: first document that the phases read, and one past the last.
        fingerprint: digest that identifies the corpus independently of its path.
        token_budgets: number of data tokens that each phase owns.
    """

    prefix: str
    weight: float
    documents: tuple[int, int]
    fingerprint: str
    token_budgets: tuple[int, ...]

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "DocumentSplit":
        """Read a split that a checkpoint holds; before version 0.2 the token budgets were called ``quotas``."""
        budgets = saved["token_budgets"] if "token_budgets" in saved else saved["quotas"]
        start, stop = saved["documents"]
        return cls(saved["prefix"], saved["weight"], (start, stop), saved["fingerprint"], tuple(budgets))

    def is_of(self, other: "DocumentSplit") -> bool:
        """Return whether the other split has the same documents, with the same weight in the blend."""
        facts = [(split.weight, split.documents, split.fingerprint) for split in (self, other)]
        return facts[0] == facts[1]


@dataclass(frozen=True)
class PhaseDocuments:
    """The documents of one phase.

    Attributes:
        documents: int32 indices of the documents.
        num_tokens: number of data tokens in these documents.
    """

    documents: NDArray[numpy.int32]
    num_tokens: int


def token_budgets(wanted: list[int], num_tokens: int, longest: int) -> list[int]:
    """Return the number of data tokens that each phase owns.

    If the corpus is large enough, each phase gets the tokens that it will read plus one document, and the last phase
    gets all that remain: if the run is extended, it finds new text there, and the earlier phases keep theirs. A smaller
    corpus is split in proportion, and each phase reads its own documents more than once.

    Args:
        wanted: number of data tokens that each phase will read.
        num_tokens: number of data tokens in the corpus.
        longest: number of data tokens of the longest document, which cannot be divided.
    """
    spared = [budget + longest for budget in wanted[:-1]]
    if sum(spared) + wanted[-1] <= num_tokens:
        return [*spared, num_tokens - sum(spared)]
    parts = [num_tokens * budget // sum(wanted) for budget in wanted[:-1]]
    return [*parts, num_tokens - sum(parts)]


def split_into_phases(
    lengths: NDArray[numpy.int32], start: int, stop: int, budgets: list[int], seed: int
) -> list[PhaseDocuments]:
    """Assign the documents ``start .. stop - 1`` to the phases at random, up to each phase's token budget.

    Every document belongs to exactly one phase. Each block of documents is split in proportion to the budgets, minus
    the excess that earlier blocks assigned, so a phase's documents match its budget to within one document.

    Args:
        lengths: number of data tokens of each document of the corpus; may be a memory map.
        start: first document to assign.
        stop: one past the last document to assign.
        budgets: token budget of each phase; their sum is the number of data tokens of these documents.
        seed: seed of the permutation.
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
