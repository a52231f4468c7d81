"""Documents as text, streamed from files, folders and (compressed) JSON lines."""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_tst.config import UserError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
EXAMPLES_KEPT = 5


@dataclass
class Skipped:
    """What could not be read, counted by reason, with the first few places.

    Attributes:
        counts: reason to number of documents.
        examples: ``file:line`` or file of the first few.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one document that was left out."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{place} ({reason})")

    @property
    def total(self) -> int:
        """Documents left out in all."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Document:
    """One document and how many bytes of input stand for it.

    Attributes:
        text: its text.
        num_bytes: bytes read, for progress.
    """

    text: str
    num_bytes: int


def list_inputs(names: list[str], suffixes: tuple[str, ...] = (), excluded: frozenset[str] = frozenset()) -> list[Path]:
    """List the files to read: each name itself, or all files below it in the order of their paths.

    Args:
        names: files and folders.
        suffixes: of the files below a folder, those to take; all where empty.
        excluded: names of folders below a folder to leave out.

    Raises:
        UserError: if a name does not exist or nothing is left to read.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.exists():
            raise UserError(f"--input {name}: does not exist")
        files.extend(_files_below(path, suffixes or ("",), excluded) if path.is_dir() else [path])
    if not files:
        raise UserError(f"--input {' '.join(names)}: holds no files" + (f" ending in {suffixes}" if suffixes else ""))
    return files


def _files_below(folder: Path, suffixes: tuple[str, ...], excluded: frozenset[str]) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.endswith(suffixes) and not excluded.intersection(file.relative_to(folder).parts) and file.is_file()
    ]


def read_documents(files: list[Path], json_key: str, skipped: Skipped) -> Iterator[Document]:
    """Stream the documents of all files: a line of JSON each, or a whole text file.

    Empty documents, lines that are not JSON objects with a string under ``json_key``, and text that is not UTF-8 are
    left out and counted.

    Args:
        files: what to read.
        json_key: the key of the text in a line of JSON.
        skipped: counts what is left out.

    Raises:
        UserError: if a file cannot be read or decompressed.
    """
    for file in files:
        try:
            if file.name.endswith(JSON_LINES):
                yield from _read_json_lines(file, json_key, skipped)
            else:
                yield from _read_text(file, skipped)
        except (OSError, EOFError, zstandard.ZstdError) as error:
            raise UserError(f"--input {file}: cannot be read: {error}") from error


def _read_text(file: Path, skipped: Skipped) -> Iterator[Document]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        skipped.add(str(file), "not UTF-8")
        return
    if text:
        yield Document(text, len(content))
    else:
        skipped.add(str(file), "empty")


def _read_json_lines(file: Path, json_key: str, skipped: Skipped) -> Iterator[Document]:
    with file.open("rb") as raw:
        size_before = 0
        for number, line in enumerate(_decompressed(raw, file), start=1):
            # Progress counts bytes of the file, compressed or not.
            size, size_before = raw.tell() - size_before, raw.tell()
            if not line.strip():
                continue
            text, reason = _parse_line(line, json_key)
            if text:
                yield Document(text, size)
            else:
                skipped.add(f"{file}:{number}", reason)


def _decompressed(raw: BinaryIO, file: Path) -> Iterable[bytes]:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _parse_line(line: bytes, json_key: str) -> tuple[str, str]:
    """Return the text, or "" and why there is none."""
    try:
        entry = json.loads(line)
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except ValueError:
        return "", "not JSON"
    text = entry.get(json_key) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        return "", f"no text under {json_key!r}"
    try:
        text.encode()  # JSON can spell half a surrogate pair, which is no character
    except UnicodeEncodeError:
        return "", "not UTF-8"
    return text, "empty"
