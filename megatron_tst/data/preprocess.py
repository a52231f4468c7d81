"""Convert text to megatron-core's ``.bin``/``.idx`` files: streaming, in several processes, all or nothing."""

import contextlib
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_tst.config import UserError
from megatron_tst.data.documents import Document, Skipped, read_documents
from megatron_tst.data.tokenizer import Tokenizer, check_vocab_size, learn_bpe
from megatron_tst.data.workers import ask_all, ask_one

# Documents are sent to the workers in batches of about this many characters: large enough to amortise the transfer, and
# small enough to keep all workers busy.
BATCH_CHARACTERS = 1 << 20

# (texts, size of the texts in the input in bytes)
_Batch = tuple[list[str], int]
# (token ids of all documents, concatenated; length of each document; size of the documents in the input in bytes)
_Encoded = tuple[NDArray[numpy.uint32], NDArray[numpy.int64], int]


@dataclass(frozen=True)
class Written:
    """The files that one run of preprocessing wrote.

    Attributes:
        prefix: path of the ``.bin`` and ``.idx`` files without their suffix.
        num_documents: number of documents in the files.
        num_tokens: number of data tokens in the files, including end-of-document tokens.
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

    Both files appear complete at the end; after an error or an interruption neither exists. No other process may write
    the same prefix in the meantime, so the caller must hold its lock.

    Args:
        documents: the documents to write.
        tokenizer: the tokenizer that encodes them.
        prefix: path of the files to write, without their suffix.
        append_eod: whether to end each document with the end-of-document token.
        workers: number of processes that encode; with 1, this process encodes, with all its threads.
        on_progress: function that is called with the bytes of input processed since the last call.

    Raises:
        UserError: if there are no documents, or the files cannot be written.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    partial_bin, partial_idx = Path(f"{prefix}.bin.partial"), Path(f"{prefix}.idx.partial")
    num_documents = num_tokens = 0
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(partial_bin), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        with contextlib.closing(_encode_all(documents, tokenizer, append_eod, workers)) as encoded:
            for ids, lengths, num_bytes in encoded:
                for document in numpy.split(ids, numpy.cumsum(lengths)[:-1]):
                    builder.add_document(document, [len(document)])
                num_documents += len(lengths)
                num_tokens += len(ids)
                on_progress(num_bytes)
        if not num_documents:
            raise UserError("--input: contains no documents to write")
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


def learn_tokenizer(files: list[Path], json_key: str, vocab_size: int) -> str:
    """Learn a byte-level BPE from the documents of all files in a separate process.

    The separate process allows this one to be interrupted, because the library does not return before it is done.

    Returns:
        The content of the tokenizer's ``tokenizer.json``.

    Raises:
        UserError: if ``vocab_size`` is too small, a file cannot be read, or the process was killed.
    """
    check_vocab_size(vocab_size)
    content: str = ask_one(functools.partial(_learn, json_key=json_key, vocab_size=vocab_size), files)
    return content


def _learn(files: list[Path], json_key: str, vocab_size: int) -> str:
    # Skipped documents are counted when the files are encoded.
    return learn_bpe((document.text for document in read_documents(files, json_key, Skipped())), vocab_size)


def _encode_all(
    documents: Iterable[Document], tokenizer: Tokenizer, append_eod: bool, workers: int
) -> Generator[_Encoded, None, None]:
    end = tokenizer.eod if append_eod else None
    if workers == 1:
        return (_encode(batch, tokenizer, end) for batch in _batches(documents))
    return ask_all(functools.partial(_encode_alone, tokenizer=tokenizer, end=end), _batches(documents), workers)


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    texts: list[str] = []
    size = num_bytes = 0
    for document in documents:
        texts.append(document.text)
        size, num_bytes = size + len(document.text), num_bytes + document.num_bytes
        if size >= BATCH_CHARACTERS:
            yield texts, num_bytes
            texts, size, num_bytes = [], 0, 0
    if texts:
        yield texts, num_bytes


def _encode(batch: _Batch, tokenizer: Tokenizer, end: int | None) -> _Encoded:
    texts, num_bytes = batch
    ids, lengths = tokenizer.encode_flat(texts)
    if end is not None:
        ids, lengths = numpy.insert(ids, numpy.cumsum(lengths), end), lengths + 1
    return ids, lengths, num_bytes


def _encode_alone(batch: _Batch, tokenizer: Tokenizer, end: int | None) -> _Encoded:
    """Encode with one thread, because the libraries' threads would compete with the other workers for the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    return _encode(batch, tokenizer, end)
