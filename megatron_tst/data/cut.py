"""Cut a corpus's documents into the phases' shares, so that no phase reads another's text.

The documents are permuted by the seed and cut where the phases' budgets of data tokens say. Done block by block:
memory is one block beside the result, time is linear in the documents.
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

BLOCK_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class Share:
    """The documents of one phase.

    Attributes:
        documents: ids, int32.
        num_tokens: data tokens they hold.
    """

    documents: NDArray[numpy.int32]
    num_tokens: int


def quotas(budgets: list[int], num_tokens: int, longest: int) -> list[int]:
    """Return how many data tokens each phase owns.

    A corpus that lasts gives each phase its budget, with a document to spare, and all the rest to the last phase: a
    run that is prolonged finds new text there and its earlier phases keep theirs. A smaller corpus is divided in
    proportion, and each phase reads its own share more than once.

    Args:
        budgets: data tokens that each phase wants to read.
        num_tokens: data tokens of the corpus.
        longest: data tokens of the longest document, the finest that a cut can be.
    """
    spared = [budget + longest for budget in budgets[:-1]]
    if sum(spared) + budgets[-1] <= num_tokens:
        return [*spared, num_tokens - sum(spared)]
    parts = [num_tokens * budget // sum(budgets) for budget in budgets[:-1]]
    return [*parts, num_tokens - sum(parts)]


def cut_documents(lengths: NDArray[numpy.int32], start: int, stop: int, owned: list[int], seed: int) -> list[Share]:
    """Deal the documents ``start .. stop`` to the phases at random, each phase its quota of data tokens.

    Every document goes to exactly one phase. Each block of documents is dealt in proportion to the quotas, carrying
    what the block before gave too much, so a phase's share is its quota to within one document.

    Args:
        lengths: data tokens of each document of the corpus; may be a memory map.
        start: first document to deal.
        stop: one past the last.
        owned: quota of each phase, summing to the data tokens of these documents.
        seed: of the permutation.
    """
    bounds = numpy.cumsum(owned[:-1], dtype=numpy.float64) / max(sum(owned), 1)
    dealt = numpy.zeros(len(owned) - 1, dtype=numpy.int64)
    parts: list[list[NDArray[numpy.int32]]] = [[] for _ in owned]
    tokens = [0] * len(owned)
    seen = 0
    for block, first in enumerate(range(start, stop, BLOCK_DOCUMENTS)):
        last = min(first + BLOCK_DOCUMENTS, stop)
        order = numpy.random.default_rng((seed, block)).permutation(last - first)
        ends = numpy.cumsum(lengths[first:last][order], dtype=numpy.int64)
        seen += int(ends[-1])
        due = bounds * seen - dealt
        # A document that crosses a boundary belongs to the phase before it.
        cuts = numpy.where(due > 0, numpy.searchsorted(ends, due) + 1, 0)
        cuts = numpy.maximum.accumulate(numpy.minimum(cuts, last - first))
        dealt += numpy.where(cuts > 0, ends[cuts - 1], 0)
        documents = (order + first).astype(numpy.int32)
        for phase, part in enumerate(numpy.split(documents, cuts)):
            parts[phase].append(part)
            tokens[phase] += int(lengths[part].sum(dtype=numpy.int64))
    return [
        Share(numpy.concatenate(part) if part else numpy.empty(0, numpy.int32), count)
        for part, count in zip(parts, tokens, strict=True)
    ]
