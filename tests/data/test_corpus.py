from pathlib import Path

import pytest

from megatron_tst.config import UserError
from megatron_tst.data.corpus import open_blend, split_documents
from tests.corpora import traceable_documents, write_corpus


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus", traceable_documents(50), 50)


def test_blend_is_prefixes_or_weights_and_prefixes(prefix):
    assert [c.weight for c in open_blend((prefix,), "--data-path")] == [1.0]
    other = write_corpus(Path(f"{prefix}-other"), traceable_documents(50), 50)
    assert [c.weight for c in open_blend((prefix, other), "--data-path")] == [1.0, 1.0]
    blend = open_blend(("0.3", prefix, "0.7", other), "--data-path")
    assert [(c.weight, c.prefix) for c in blend] == [(0.3, prefix), (0.7, other)]
    assert blend[0].lengths.tolist() == [len(document) for document in traceable_documents(50)]


def test_weights_of_a_corpus_that_is_named_twice_are_summed(prefix, monkeypatch):
    folder, other = Path(prefix).parent, write_corpus(Path(f"{prefix}-other"), traceable_documents(50), 50)
    (folder / "link").symlink_to(folder, target_is_directory=True)
    for suffix in (".bin", ".idx"):
        (folder / f"alias{suffix}").symlink_to(f"{prefix}{suffix}")
    monkeypatch.chdir(folder)
    spellings = ("corpus", "./corpus", f"{folder}/../{folder.name}/corpus", "link/corpus", "alias", prefix)
    for spelling in spellings:
        blend = open_blend(("1", prefix, "2", other, "0.5", spelling), "--data-path")
        assert [(c.weight, c.prefix) for c in blend] == [(1.5, prefix), (2.0, other)], spelling
    assert [c.weight for c in open_blend((prefix, other, *spellings), "--data-path")] == [7.0, 1.0]


@pytest.mark.parametrize(
    "names", [("0.3", "a", "0.7"), ("0", "a", "1", "b"), ("-1", "a", "1", "b"), ("inf", "a", "1", "b"), ("nan", "a")]
)
def test_malformed_blend_is_refused(names):
    with pytest.raises(UserError, match="alternating weights above 0 and prefixes"):
        open_blend(names, "--data-path")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(prefix, suffix):
    Path(prefix + suffix).unlink()
    with pytest.raises(UserError, match=f"corpus{suffix} does not exist"):
        open_blend((prefix,), "--data-path")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_file_is_named(prefix, suffix, kept):
    file = Path(prefix + suffix)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(UserError, match=rf"corpus{suffix} is truncated: it has \d+ bytes instead of \d+"):
        open_blend((prefix,), "--data-path")


@pytest.mark.parametrize(("suffix", "message"), [(".bin", "too long"), (".idx", "truncated")])
def test_files_of_two_different_corpora_are_refused(prefix, tmp_path: Path, suffix, message):
    """If only one of the two files was replaced, both are complete but do not match."""
    larger = write_corpus(tmp_path / "larger", traceable_documents(100), 100)
    Path(larger + suffix).replace(prefix + suffix)
    with pytest.raises(UserError, match=rf"corpus.bin is {message}.*: it has \d+ bytes instead of \d+"):
        open_blend((prefix,), "--data-path")


@pytest.mark.parametrize(("place", "value"), [(9, 2), (17, 7), (17, 99)])
def test_index_of_another_version_or_type_is_refused(prefix, place, value):
    index = Path(prefix + ".idx")
    content = bytearray(index.read_bytes())
    content[place] = value
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"corpus.idx has version .* and type .*, so it is not an index of tokens"):
        open_blend((prefix,), "--data-path")


def test_extra_bytes_after_an_index_are_refused(prefix):
    with Path(prefix + ".idx").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"corpus.idx is too long"):
        open_blend((prefix,), "--data-path")


@pytest.mark.parametrize("content", [b"", b"not an index, whatever its name says"])
def test_file_that_is_no_index_is_refused(prefix, content):
    Path(prefix + ".idx").write_bytes(content)
    with pytest.raises(UserError, match="is not an index"):
        open_blend((prefix,), "--data-path")


def test_empty_corpus_is_refused(tmp_path: Path):
    prefix = write_corpus(tmp_path / "empty", [], 50)
    with pytest.raises(UserError, match="contains no documents"):
        open_blend((prefix,), "--data-path")


@pytest.mark.parametrize("split", ["969,30,1", "98,2,0", "1", "0.5,0.5"])
def test_split_equals_megatron_cores(split):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    ranges = split_documents(split, 1758)
    for name, bounds in zip(("train", "valid", "test"), matrix, strict=True):
        start, stop = ranges[name]
        assert (start, stop) == (round(bounds[0] * 1758), round(bounds[1] * 1758)) if bounds else start == stop


@pytest.mark.parametrize("split", ["a,b", "0,0,0", "1,1,1,1", "-1,2", "inf,1,0", "nan,1"])
def test_malformed_split_is_refused(split):
    with pytest.raises(UserError, match="must be up to three relative sizes"):
        split_documents(split, 100)
