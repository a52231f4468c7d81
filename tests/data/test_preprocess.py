import multiprocessing.resource_tracker
import os
import signal
import threading
from pathlib import Path

import numpy
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.config import UserError
from megatron_tst.data import preprocess
from megatron_tst.data.documents import Document
from megatron_tst.data.interruption import InterruptedBySignal, raise_on_signals
from megatron_tst.data.preprocess import write_indexed

TEXTS = [f"def function_{n}(argument):\n    return {n} * argument\n" * (n % 7 + 1) for n in range(60)]


def documents():
    return (Document(text, len(text)) for text in TEXTS)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(preprocess, "BATCH_CHARACTERS", 500)


@pytest.mark.parametrize("append_eod", [True, False])
def test_files_contain_the_ids_of_the_tokenizer(tmp_path: Path, tokenizer, append_eod):
    written = write_indexed(documents(), tokenizer, tmp_path / "corpus", append_eod=append_eod)
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    wanted = [library.encode(text).ids + [tokenizer.eod] * append_eod for text in TEXTS]
    indexed = IndexedDataset(str(tmp_path / "corpus"))
    assert [document.tolist() for document in indexed] == wanted
    assert indexed.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert (written.num_documents, written.num_tokens) == (len(TEXTS), sum(map(len, wanted)))
    assert tokenizer.decode(wanted[3]).startswith(TEXTS[3])


def test_worker_processes_write_the_same_files(tmp_path: Path, tokenizer):
    for workers in (1, 2):
        write_indexed(documents(), tokenizer, tmp_path / str(workers), workers=workers)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


def test_progress_adds_up_to_the_input(tmp_path: Path, tokenizer):
    seen: list[int] = []
    write_indexed(documents(), tokenizer, tmp_path / "corpus", on_progress=seen.append)
    assert len(seen) > 1
    assert sum(seen) == sum(len(text) for text in TEXTS)


@pytest.mark.parametrize("workers", [1, 2])
def test_interruption_leaves_no_files(tmp_path: Path, tokenizer, workers):
    def interrupted():
        yield from list(documents())[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_indexed(interrupted(), tokenizer, tmp_path / "corpus", workers=workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_leaves_no_files_and_no_workers(tmp_path: Path, tokenizer, number):
    def interrupted():
        yield from list(documents())[:40]
        os.kill(os.getpid(), number)
        yield from documents()

    # A test in the background of a shell inherits ignored signals.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)
    workers = 2 if number == signal.SIGTERM else 1
    with pytest.raises(InterruptedBySignal, match=number.name) as caught, raise_on_signals():
        write_indexed(interrupted(), tokenizer, tmp_path / "corpus", workers=workers)
    assert caught.value.exit_code == 128 + number
    assert list(tmp_path.iterdir()) == [] and multiprocessing.active_children() == []
    assert signal.getsignal(number) is before


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_while_a_worker_starts_prints_nothing(tmp_path: Path, tokenizer, monkeypatch, capfd):
    """The signal arrives when the process exists but has not received its task yet."""
    spawn, started = multiprocessing.util.spawnv_passfds, []

    def signalled(*args):
        started.append(spawn(*args))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    # Start the resource tracker first, so that the signal arrives while the worker starts.
    multiprocessing.resource_tracker.ensure_running()
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", signalled)
    # The kernel may deliver a signal to any thread that does not block it.
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        with pytest.raises(InterruptedBySignal), raise_on_signals():
            write_indexed(documents(), tokenizer, tmp_path / "corpus", workers=2)
    finally:
        ended.set()
        other.join()
    assert len(started) == 1
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], 0)
    assert capfd.readouterr().err == ""


def test_killed_worker_is_named(tmp_path: Path, tokenizer):
    def killing():
        yield from list(documents())[:40]
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        yield from documents()

    with pytest.raises(UserError, match=r"--workers: worker process \d+ was killed by SIGKILL") as caught:
        write_indexed(killing(), tokenizer, tmp_path / "corpus", workers=2)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [] and multiprocessing.active_children() == []


def test_empty_input_is_refused(tmp_path: Path, tokenizer):
    with pytest.raises(UserError, match="contains no documents"):
        write_indexed([], tokenizer, tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


def test_error_names_an_output_that_cannot_be_written(tmp_path: Path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-prefix .*corpus: cannot be written"):
        write_indexed(documents(), tokenizer, tmp_path / "file" / "corpus")


def test_ids_of_large_vocabularies_are_stored_in_32_bits(tmp_path: Path, tokenizer, monkeypatch):
    write_indexed(documents(), tokenizer, tmp_path / "narrow")
    monkeypatch.setattr(tokenizer, "vocab_size", 128256)
    write_indexed(documents(), tokenizer, tmp_path / "wide")
    assert IndexedDataset(str(tmp_path / "narrow")).get(0).dtype == numpy.uint16
    assert IndexedDataset(str(tmp_path / "wide")).get(0).dtype == numpy.int32
