"""Turn text into megatron-core's ``.bin``/``.idx`` files: streaming, in several processes, all or nothing."""

import functools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_tst.config import UserError
from megatron_tst.data.documents import Document
from megatron_tst.data.tokenizer import Tokenizer, load_tokenizer

# Documents travel to the workers in batches of about this many characters: enough to amortise the trip, few enough
# that all workers stay busy.
BATCH_CHARACTERS = 1 << 20
BATCHES_AHEAD_PER_WORKER = 3

# (token ids of all documents end to end, length of each document, bytes of input they took)
_Encoded = tuple[NDArray[numpy.uint32], NDArray[numpy.int64], int]


@dataclass(frozen=True)
class Written:
    """What one run of preprocessing wrote.

    Attributes:
        prefix: of the ``.bin`` and ``.idx`` files.
        num_documents: documents in them.
        num_tokens: data tokens in them, ends of documents included.
    """

    prefix: Path
    num_documents: int
    num_tokens: int


def write_indexed(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    append_eod: bool = True,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """Encode documents and write them as ``prefix.bin`` and ``prefix.idx``, in the order given.

    Both files appear at the end, complete; an error or an interruption leaves neither.

    Args:
        documents: the text.
        tokenizer: how to encode it.
        prefix: of the files to write.
        append_eod: whether to end each document with the end-of-document token.
        workers: processes that encode; 1 encodes in this one, with all its threads.
        on_progress: called with the bytes of input done since the last call.

    Raises:
        UserError: if there is no document, or the files cannot be written.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    partial_bin, partial_idx = Path(f"{prefix}.bin.partial"), Path(f"{prefix}.idx.partial")
    num_documents = num_tokens = 0
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(partial_bin), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for ids, lengths, num_bytes in _encode_all(documents, tokenizer, append_eod, workers):
            for document in numpy.split(ids, numpy.cumsum(lengths)[:-1]):
                builder.add_document(document, [len(document)])
            num_documents += len(lengths)
            num_tokens += len(ids)
            on_progress(num_bytes)
        if not num_documents:
            raise UserError("--input: holds no document to write")
        builder.finalize(str(partial_idx))
        partial_bin.replace(f"{prefix}.bin")
        partial_idx.replace(f"{prefix}.idx")
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot be written: {error}") from error
    finally:
        for partial in (partial_bin, partial_idx):
            if partial.exists():
                partial.unlink()
    return Written(prefix, num_documents, num_tokens)


def _encode_all(
    documents: Iterable[Document], tokenizer: Tokenizer, append_eod: bool, workers: int
) -> Iterator[_Encoded]:
    end = tokenizer.eod if append_eod else None
    batches = _batches(documents)
    if workers == 1:
        yield from (_encode(batch, tokenizer, end) for batch in batches)
        return
    # Spawned, not forked: the parent may already run threads, the tokenizer's among them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        waiting: deque[Future[_Encoded]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode_in_worker, batch, str(tokenizer.path), end))
                if len(waiting) >= workers * BATCHES_AHEAD_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer, end: int | None) -> _Encoded:
    ids, lengths = tokenizer.encode_flat([document.text for document in batch])
    if end is not None:
        ids, lengths = numpy.insert(ids, numpy.cumsum(lengths), end), lengths + 1
    return ids, lengths, sum(document.num_bytes for document in batch)


def _start_worker() -> None:
    # One process is one worker: the libraries' own threads would fight over the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["FASTOKENS_BPE_THREADS"] = "1"


_load_once = functools.cache(load_tokenizer)


def _encode_in_worker(batch: list[Document], tokenizer_path: str, end: int | None) -> _Encoded:
    return _encode(batch, _load_once(tokenizer_path), end)
