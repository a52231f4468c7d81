#!/usr/bin/env python3
"""Measure time and memory of splitting documents between two phases, and of indexing the samples of one phase.

    python benchmarks/document_split.py [--documents 1e6 1e7 1e8] [--json document_split.json]

Each size runs in a separate process to isolate its peak memory. Documents have 200 to 1000 data tokens. Prints seconds,
peak memory without the document lengths themselves, and both per document.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

SEQUENCE = 8192


def measure(num_documents: int) -> dict[str, float]:
    """Split this many documents in two, then build megatron-core's sample indices of the larger part."""
    from megatron_tst.data.document_split import split_into_phases, token_budgets

    # isort: split
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    lengths = numpy.random.default_rng(0).integers(200, 1001, num_documents, dtype=numpy.int32)
    total = int(lengths.sum(dtype=numpy.int64))
    before = peak_bytes()
    start = time.perf_counter()
    shares = split_into_phases(lengths, 0, num_documents, token_budgets([total // 2, total // 4], total, 1000), seed=1)
    cut_s, cut_bytes = time.perf_counter() - start, peak_bytes() - before
    start = time.perf_counter()
    state = numpy.random.RandomState(1)
    documents = _build_document_index(shares[0].documents, 1, state, False)
    tokens = shares[0].num_tokens
    samples = helpers.build_sample_idx(lengths, documents, SEQUENCE, 1, tokens, True, 1)
    _build_shuffle_index(len(samples) - 1, len(samples) - 1, state)
    return {
        "documents": num_documents,
        "cut_s": cut_s,
        "cut_gib": cut_bytes / 2**30,
        "index_s": time.perf_counter() - start,
        "index_gib": (peak_bytes() - before) / 2**30,
    }


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", type=float, default=[1e6, 1e7])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        json.dump(measure(int(arguments.one)), sys.stdout)
        return
    rows = []
    print(
        "| documents | split, s | split, GiB | indices of half of them, s | both, GiB | split, ns/document "
        "| both, bytes/document |"
    )
    print("|---|---|---|---|---|---|---|")
    for number in arguments.documents:
        with tempfile.TemporaryFile("w+") as output:
            subprocess.run([sys.executable, __file__, "--one", str(number)], stdout=output, check=True)
            output.seek(0)
            row = json.load(output)
        rows.append(row)
        print(
            f"| {row['documents']:.0e} | {row['cut_s']:.2f} | {row['cut_gib']:.3f} | {row['index_s']:.2f} | "
            f"{row['index_gib']:.3f} | {row['cut_s'] / number * 1e9:.0f} | {row['index_gib'] * 2**30 / number:.1f} |"
        )
    if arguments.json:
        from megatron_tst.config import write_json

        arguments.json.write_text(write_json(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
