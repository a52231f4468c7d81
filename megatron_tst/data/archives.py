"""Files as streams of bytes: packed ones are recognised by how they begin, and unpacked to their very end."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

GZIP, ZSTANDARD = "gzip", "zstandard"
PACKED_SUFFIXES = {".gz": GZIP, ".gzip": GZIP, ".zst": ZSTANDARD, ".zstd": ZSTANDARD}
# How files of each kind begin; a skippable frame of zstandard has one of sixteen numbers.
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
# A frame may refer to text this many bytes back, as `zstd --ultra --long=31` writes it.
_LARGEST_WINDOW = 1 << 31

# What reading a damaged archive raises.
DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)


class UnreadableArchiveError(Exception):
    """A file is packed in a way that is not read here, or not in the way that its name says."""


def open_unpacked(raw: io.BufferedReader, file: Path) -> io.BufferedReader:
    """Return the content of a file, unpacked where it is gzip or zstandard, of one part or of several end to end.

    Args:
        raw: the file, open at its beginning.
        file: its path.

    Raises:
        UnreadableArchiveError: if it is of another kind, or is not of the kind that its suffix names. Reading raises
            one of ``DAMAGES`` or an OSError where the archive is damaged or cut off.
    """
    head = raw.read(_TAR_PLACE + len(_TAR))
    raw.seek(0)
    kind = next((kind for kind, beginnings in _BEGINNINGS.items() if head.startswith(beginnings)), None)
    named = PACKED_SUFFIXES.get(file.suffix.lower())
    if named not in (None, kind):
        raise UnreadableArchiveError(f"is not {named}, as its name says" if head else f"is empty, and no {named}")
    unpacked = raw
    if kind == GZIP:
        unpacked = io.BufferedReader(gzip.GzipFile(fileobj=raw))
    elif kind == ZSTANDARD:
        unpacked = io.BufferedReader(_Chunks(_unpack_zstandard(raw)))
    elif kind is not None:
        raise UnreadableArchiveError(f"is {kind}, which is not read: unpack it, or leave it out")
    if _is_tar(unpacked.peek(_TAR_PLACE + len(_TAR))):
        raise UnreadableArchiveError("is a tar archive, which is not read: unpack it, or leave it out")
    return unpacked


def _is_tar(head: bytes) -> bool:
    return head[_TAR_PLACE:].startswith(_TAR)


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the next bytes reach; 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _unpack_zstandard(raw: io.BufferedReader) -> Iterator[bytes]:
    """Unpack frame after frame.

    The library's own ``stream_reader`` takes the end of a file within a frame for the end of the text.
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
