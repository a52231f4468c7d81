"""Compressed files: complete ones of one or several parts, and files with every kind of damage."""

import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard

from megatron_tst.config import UserError
from megatron_tst.data.documents import Skipped, read_documents

TEXTS = [f"document {number}: naïve ☃ {number * 7919:x}" for number in range(2000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
HALVES = LINES[: LINES.index(b"\n", len(LINES) // 2) + 1], LINES[LINES.index(b"\n", len(LINES) // 2) + 1 :]
PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00pzst"

# Kinds of damage to an archive of two parts, as functions of its content and the offset of its second part.
DAMAGE = {
    "cut at 1 byte": lambda packed, second: packed[:1],
    "cut at 100 bytes": lambda packed, second: packed[:100],
    "cut in half": lambda packed, second: packed[: len(packed) // 2],
    "cut by a byte": lambda packed, second: packed[:-1],
    "cut in the header of the second part": lambda packed, second: packed[: second + 3],
    "emptied": lambda packed, second: b"",
    "a wrong beginning": lambda packed, second: b"XX" + packed[2:],
    "a wrong beginning of the second part": lambda packed, second: packed[:second] + b"XX" + packed[second + 2 :],
    "a flipped bit": lambda packed, second: packed[:500] + bytes((packed[500] ^ 1,)) + packed[501:],
    "other bytes within": lambda packed, second: packed[:20] + b"\xff" * 40 + packed[60:],
    "other bytes at the end": lambda packed, second: packed + b"other bytes",
}


def texts(file: Path) -> list[str]:
    return [document.text for document in read_documents([file], "text", Skipped())]


@pytest.mark.parametrize("suffix", PACK)
def test_all_parts_of_an_archive_are_read(tmp_path: Path, suffix):
    one, two = map(PACK[suffix], HALVES)
    (tmp_path / f"one{suffix}").write_bytes(PACK[suffix](LINES))
    (tmp_path / f"two.jsonl{suffix.upper()}").write_bytes(one + two)
    (tmp_path / "no-suffix").write_bytes(one + (SKIPPABLE if suffix == ".zst" else b"") + two)
    for file in tmp_path.iterdir():
        assert texts(file) == TEXTS, file.name


def test_frame_with_a_large_window_is_read(tmp_path: Path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "long.jsonl.zst").write_bytes(compressor.compress(LINES) + compressor.flush())
    assert texts(tmp_path / "long.jsonl.zst") == TEXTS


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", PACK)
def test_damaged_archive_is_refused(tmp_path: Path, suffix, damage):
    one, two = map(PACK[suffix], HALVES)
    file = tmp_path / f"damaged.jsonl{suffix}"
    file.write_bytes(DAMAGE[damage](one + two, len(one)))
    with pytest.raises(UserError, match=rf"--input {file}: cannot be read: ") as caught:
        texts(file)
    assert "\n" not in str(caught.value)


def test_librarys_own_reader_accepts_a_truncated_archive():
    text = b"".join(b"%d\n" % number for number in range(100_000))
    packed = zstandard.compress(text)
    reader = zstandard.ZstdDecompressor().stream_reader(packed[: len(packed) // 2], read_across_frames=True)
    lines = io.BufferedReader(reader).readlines()
    assert 0 < len(lines) < 100_000


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"BZh91AY&SY", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"PK\x03\x04", "zip"),
        (b"PAR1", "Parquet"),
        (b"member.txt".ljust(257, b"\x00") + b"ustar\x00", "a tar archive"),
        (gzip.compress(b"member.txt".ljust(257, b"\x00") + b"ustar\x00"), "a tar archive"),
    ],
)
def test_unsupported_compression_is_refused(tmp_path: Path, content, kind):
    for name in ("part-00000", "in.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read: is {kind}, which is not supported"):
            texts(tmp_path / name)
