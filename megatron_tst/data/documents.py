"""Documents as text, streamed from files, folders and (compressed) JSON lines."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tst.config import UserError
from megatron_tst.data.archives import DAMAGES, PACKED_SUFFIXES, UnreadableArchiveError, open_unpacked

JSON_LINES = (".jsonl", ".ndjson", ".json")
# How a line of JSON begins, whatever its file is called; a byte order mark may stand before it.
_JSON_BEGINS = re.compile(rb'(\xef\xbb\xbf)?\s*\[?\s*\{\s*"')
EXAMPLES_KEPT = 5
# Why a document without text is left out; there is nothing to look up in it.
EMPTY = "empty"


@dataclass
class Skipped:
    """What could not be read, counted by reason, with the first few places.

    Attributes:
        counts: reason to number of documents.
        examples: ``file:line`` or file of the first few that are not just empty.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one document that was left out."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if reason != EMPTY and len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{place} ({reason})")

    @property
    def total(self) -> int:
        """Documents left out in all."""
        return sum(self.counts.values())

    def describe(self) -> str:
        """Say how many were left out, why, and where the first few stood."""
        if not self.total:
            return "no document was left out"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())
        first = f"; first: {'; '.join(self.examples)}" if self.examples else ""
        return f"left out {self.total:,} documents: {reasons}{first}"


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
        if not name or not path.exists():
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
    """Stream the documents of all files, packed or not: a line of JSON each, or a whole text file.

    A file holds JSON lines if its name says so, or if the first line that is not blank begins as an object of JSON.
    Empty documents, lines that are not JSON objects with a string under ``json_key``, and text that is not UTF-8 are
    left out and counted.

    Args:
        files: what to read.
        json_key: the key of the text in a line of JSON.
        skipped: counts what is left out.

    Raises:
        UserError: if a file cannot be read or unpacked to its end, or no file holds a document.
    """
    is_empty = True
    for file in files:
        try:
            for document in _read_file(file, json_key, skipped):
                is_empty = False
                yield document
        except (OSError, UnreadableArchiveError, *DAMAGES) as error:
            raise UserError(f"--input {file}: cannot be read: {error}") from error
    if is_empty:
        raise UserError(f"--input: holds no document to write: {skipped.describe()}")


def _read_file(file: Path, json_key: str, skipped: Skipped) -> Iterator[Document]:
    with file.open("rb") as raw:
        content = open_unpacked(raw, file)
        head = []
        for line in content:
            head.append(line)
            if not line.isspace():
                break
        if is_named_json_lines(file) or (head and _JSON_BEGINS.match(head[-1])):
            size_before = 0
            for number, line in enumerate(itertools.chain(head, content), start=1):
                # Progress counts bytes of the file, packed or not.
                size, size_before = raw.tell() - size_before, raw.tell()
                text, reason = _parse_line(line, json_key)
                if text:
                    yield Document(text, size)
                elif not line.isspace():
                    skipped.add(f"{file}:{number}", reason)
            return
        text, reason = _decode(b"".join(head) + content.read())
        if text:
            yield Document(text, raw.tell())
        else:
            skipped.add(str(file), reason)


def is_named_json_lines(file: Path) -> bool:
    """Return whether a file's name says that it holds JSON lines, packed or not, in letters of any case."""
    name = Path(file.name.lower())
    return (name.stem if name.suffix in PACKED_SUFFIXES else name.name).endswith(JSON_LINES)


def _decode(content: bytes) -> tuple[str, str]:
    """Return the text, or "" and why there is none."""
    try:
        return content.decode("utf-8"), EMPTY
    except UnicodeDecodeError:
        return "", "not UTF-8"


def _parse_line(line: bytes, json_key: str) -> tuple[str, str]:
    """Return the text, or "" and why there is none."""
    try:
        entry = json.loads(line)
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except (ValueError, RecursionError):
        return "", "not JSON"
    if not isinstance(entry, dict):
        return "", "not a JSON object"
    text = entry.get(json_key)
    if not isinstance(text, str):
        return "", f"no text under {json_key!r}"
    try:
        text.encode()  # JSON can spell half a surrogate pair, which is no character
    except UnicodeEncodeError:
        return "", "not UTF-8"
    return text, EMPTY
