"""The cache of a run: damaged or dangerous files, and errors while writing."""

import io
import os
import pickle
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets import gpt_dataset

from megatron_tst.config import UserError
from megatron_tst.data import samples
from megatron_tst.data.cache import read_array, save_array
from tests.corpora import traceable_documents, write_corpus
from tests.data.test_samples import COUNT, build

DAMAGE = {
    "emptied": lambda content: b"",
    "cut in its header": lambda content: content[:7],
    "cut at its end": lambda content: content[:-1],
    "zeros, as after a crash": lambda content: bytes(len(content)),
    "an open bracket in its header": lambda content: content.replace(b"}", b"("),
    "an archive of arrays": lambda content: b"PK\x03\x04" + content,
}
KINDS = ("document", "sample", "shuffle")
FILES = ("split-*-phase1.npy", "blend-*.npy", *(f"train-phase0-*/*-{kind}_index.npy" for kind in KINDS))


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus", traceable_documents(COUNT), COUNT)


def text_of(data) -> list[list[int]]:
    return [data.train[(phase, k)].tolist() for phase in range(2) for k in range(8)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_and_rebuilt(rank, prefix, tokenizer, tmp_path, caplog, damage):
    before = text_of(build(prefix, tokenizer, tmp_path))
    for pattern in FILES:
        file = next(tmp_path.glob(f"cache/{pattern}"))
        content = file.read_bytes()
        file.write_bytes(DAMAGE[damage](content))
        caplog.clear()
        assert text_of(build(prefix, tokenizer, tmp_path)) == before
        assert f"{file} is damaged and will be rebuilt" in caplog.text
        assert file.read_bytes() == content
    assert not list(tmp_path.glob("cache/*.partial-*"))


def test_complete_cache_is_not_written_again(rank, prefix, tokenizer, tmp_path, caplog):
    build(prefix, tokenizer, tmp_path)
    files = {file: file.stat().st_ino for file in tmp_path.glob("cache/**/*.npy")}
    build(prefix, tokenizer, tmp_path)
    assert {file: file.stat().st_ino for file in tmp_path.glob("cache/**/*.npy")} == files
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("kind", ["a pickle", "an array of objects"])
def test_nothing_in_a_cache_is_executed(rank, prefix, tokenizer, tmp_path, kind):
    before, canary, buffer = text_of(build(prefix, tokenizer, tmp_path)), tmp_path / "canary", io.BytesIO()
    if kind == "a pickle":
        pickle.dump(Bomb(canary), buffer)
    else:
        numpy.save(buffer, numpy.array([Bomb(canary)], dtype=object), allow_pickle=True)
    for pattern in FILES:
        file = next(tmp_path.glob(f"cache/{pattern}"))
        file.write_bytes(buffer.getvalue())
        assert text_of(build(prefix, tokenizer, tmp_path)) == before
    assert not canary.exists()
    numpy.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)
    assert canary.exists()


def test_megatron_cores_own_reader_executes_or_refuses_pickles(rank, prefix, tokenizer, tmp_path, monkeypatch):
    real, calls = samples.build_epoch, []

    def remember(*args):
        calls.append(args)
        real(*args)

    monkeypatch.setattr(samples, "build_epoch", remember)
    build(prefix, tokenizer, tmp_path)
    (tmp_path / "indices").mkdir()
    arguments = (*calls[0][:-1], tmp_path / "indices")
    real(*arguments)
    for file in (tmp_path / "indices").glob("*_index.npy"):
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    # Later versions of megatron-core refuse the pickle; earlier ones load it and then find no array.
    is_guarded = hasattr(gpt_dataset, "safe_numpy_load")
    with pytest.raises(pickle.UnpicklingError if is_guarded else AttributeError):
        real(*arguments)
    assert (tmp_path / "canary").exists() != is_guarded


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_error_names_a_cache_that_cannot_be_written(rank, prefix, tokenizer, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "cache").symlink_to(tmp_path / place)
    with pytest.raises(UserError, match=r"--data-cache-path .*cache: cannot be written: ") as caught:
        build(prefix, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


def test_full_disk_leaves_no_partial_file(rank, prefix, tokenizer, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"--data-cache-path .*No space left on device"):
        build(prefix, tokenizer, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("array", [numpy.arange(5), numpy.empty(0, numpy.int32), numpy.zeros((3, 2))])
def test_array_is_read_as_it_was_written(tmp_path: Path, array):
    save_array(tmp_path / "array.npy", array)
    found = read_array(tmp_path / "array.npy")
    assert found is not None
    assert found.dtype == array.dtype and numpy.array_equal(found, array)
    assert read_array(tmp_path / "none.npy") is None
