"""Small corpora: source text of the standard library, and documents that their tokens identify."""

import argparse
import json
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

FILES = [argparse.__file__, json.__file__, json.decoder.__file__]


def write_corpus(prefix: Path, documents: list[list[int]], vocab_size: int) -> str:
    """Write documents of token ids as megatron-core's indexed dataset; return its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(numpy.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def traceable_documents(count: int, seed: int = 0) -> list[list[int]]:
    """Return documents of random length in which every token is the document's number."""
    lengths = numpy.random.default_rng(seed).integers(3, 40, count)
    return [[number] * int(length) for number, length in enumerate(lengths)]
