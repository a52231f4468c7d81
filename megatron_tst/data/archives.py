"""Files as streams of bytes; compressed files are recognised by their first bytes and decompressed completely."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

GZIP, ZSTANDARD = "gzip", "zstandard"
PACKED_SUFFIXES = {".gz": GZIP, ".gzip": GZIP, ".zst": ZSTANDARD, ".zstd": ZSTANDARD}
# The first bytes of files of each kind; zstandard has sixteen kinds of skippable frames.
_BEGINNINGS = {
    GZIP: (b"\x1f\x8b",),
    ZSTANDARD: (b"\x28\xb5\x2f\xfd", *(bytes((number, 0x2A, 0x4D, 0x18)) for number in range(0x50, 0x60))),
    "bzip2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00",),
    "lz4": (b"\x04\x22\x4d\x18",),
    "zip": (b"PK\x03\x04",),
    "Parquet": (b"PAR1",),
}
_TAR, _TAR_PLACE = b"ustar", 257
_CHUNK = 1 << 15
# The largest distance in bytes that a frame may refer back; `zstd --ultra --long=31` uses it.
_LARGEST_WINDOW = 1 << 31

# The errors that reading a damaged archive raises.
DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)


class UnreadableArchiveError(Exception):
    """The compression of a file is not supported, or is not the one that the file's suffix names."""


def open_unpacked(raw: io.BufferedReader, file: Path) -> io.BufferedReader:
    """Return the content of a file, decompressed if it is gzip or zstandard, with one or several members or frames.

    Args:
        raw: the open file, positioned at its beginning.
        file: the file's path.

    Raises:
        UnreadableArchiveError: if the file has another kind of compression, or not the kind that its suffix names.
            Reading raises one of ``DAMAGES`` or an OSError if the archive is damaged or truncated.
    """
    head = raw.read(_TAR_PLACE + len(_TAR))
    raw.seek(0)
    kind = next((kind for kind, beginnings in _BEGINNINGS.items() if head.startswith(beginnings)), None)
    named = PACKED_SUFFIXES.get(file.suffix.lower())
    if named not in (None, kind):
        raise UnreadableArchiveError(f"is not {named}, contrary to its suffix" if head else f"is empty, not {named}")
    unpacked = raw
    if kind == GZIP:
        unpacked = io.BufferedReader(gzip.GzipFile(fileobj=raw))
    elif kind == ZSTANDARD:
        unpacked = io.BufferedReader(_Chunks(_unpack_zstandard(raw)))
    elif kind is not None:
        raise UnreadableArchiveError(f"is {kind}, which is not supported; unpack the file or leave it out")
    if _is_tar(unpacked.peek(_TAR_PLACE + len(_TAR))):
        raise UnreadableArchiveError("is a tar archive, which is not supported; unpack the file or leave it out")
    return unpacked


def _is_tar(head: bytes) -> bool:
    return head[_TAR_PLACE:].startswith(_TAR)


class _Chunks(io.RawIOBase):
    """A binary file over an iterator of byte chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Copy available bytes into the buffer and return their number, which is 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _unpack_zstandard(raw: io.BufferedReader) -> Iterator[bytes]:
    """Decompress frame after frame.

    The library's own ``stream_reader`` treats the end of a file within a frame as the end of the text.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    packed = raw.read(_CHUNK)
    while packed:
        frame = decompressor.decompressobj()
        while not frame.eof:
            if not packed:
                raise EOFError("the file ends within a zstandard frame")
            yield frame.decompress(packed)
            packed = (frame.unused_data if frame.eof else b"") or raw.read(_CHUNK)
