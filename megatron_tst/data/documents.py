"""Documents as text, streamed from text files and JSON lines, compressed or not."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tst.config import UserError
from megatron_tst.data.archives import DAMAGES, PACKED_SUFFIXES, UnreadableArchiveError, open_unpacked

JSON_LINES = (".jsonl", ".ndjson", ".json")
# The beginning of a JSON line, whatever the name of its file; a byte order mark may precede it.
_JSON_BEGINS = re.compile(rb'(\xef\xbb\xbf)?\s*\[?\s*\{\s*"')
EXAMPLES_KEPT = 5
# The reason to skip a document without text; such documents are not listed as examples.
EMPTY = "empty"


@dataclass
class Skipped:
    """Documents that were skipped, counted by reason, with the places of the first few.

    Attributes:
        counts: number of skipped documents by reason.
        examples: ``file:line`` or file of the first few skipped documents that are not just empty.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one skipped document."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if reason != EMPTY and len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{place} ({reason})")

    @property
    def total(self) -> int:
        """Number of all skipped documents."""
        return sum(self.counts.values())

    def describe(self) -> str:
        """Return a line with the number of skipped documents, the reasons, and the places of the first few."""
        if not self.total:
            return "no document was skipped"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())
        first = f"; first: {'; '.join(self.examples)}" if self.examples else ""
        return f"skipped {self.total:,} documents: {reasons}{first}"


@dataclass(frozen=True)
class Document:
    """One document and its size in the input.

    Attributes:
        text: the document's text.
        num_bytes: bytes of the input file that hold the document, for progress.
    """

    text: str
    num_bytes: int


def list_inputs(names: list[str], suffixes: tuple[str, ...] = (), excluded: frozenset[str] = frozenset()) -> list[Path]:
    """List the files to read: each named file, and all files below each named directory in path order.

    Args:
        names: files and directories.
        suffixes: suffixes of the files to read below directories; all files are read if empty.
        excluded: names of subdirectories to skip.

    Raises:
        UserError: if a name does not exist or there are no files to read.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not name or not path.exists():
            raise UserError(f"--input {name}: does not exist")
        files.extend(_files_below(path, suffixes or ("",), excluded) if path.is_dir() else [path])
    if not files:
        ending = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise UserError(f"--input {' '.join(names)}: contains no files{ending}")
    return files


def _files_below(folder: Path, suffixes: tuple[str, ...], excluded: frozenset[str]) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.endswith(suffixes) and not excluded.intersection(file.relative_to(folder).parts) and file.is_file()
    ]


def read_documents(files: list[Path], json_key: str, skipped: Skipped) -> Iterator[Document]:
    """Stream the documents of all files, compressed or not; a document is a JSON line or a whole text file.

    A file contains JSON lines if its name says so, or if its first line that is not blank begins like a JSON object.
    Empty documents, lines that are not JSON objects with a string under ``json_key``, and text that is not UTF-8 are
    skipped and counted.

    Args:
        files: the files to read.
        json_key: the key of the text in a JSON line.
        skipped: receives the counts of skipped documents.

    Raises:
        UserError: if a file cannot be read or decompressed to its end, or no file contains a document.
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
        raise UserError(f"--input: contains no documents to write: {skipped.describe()}")


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
                # Progress counts bytes of the file, also if it is compressed.
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
    """Return whether the suffix of a file's name, in upper or lower case, means JSON lines, compressed or not."""
    name = Path(file.name.lower())
    return (name.stem if name.suffix in PACKED_SUFFIXES else name.name).endswith(JSON_LINES)


def _decode(content: bytes) -> tuple[str, str]:
    """Return the text and "", or "" and the reason to skip the document."""
    try:
        return content.decode("utf-8"), EMPTY
    except UnicodeDecodeError:
        return "", "not UTF-8"


def _parse_line(line: bytes, json_key: str) -> tuple[str, str]:
    """Return the text and "", or "" and the reason to skip the document."""
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
        text.encode()  # JSON can contain lone surrogates, which are not characters
    except UnicodeEncodeError:
        return "", "not UTF-8"
    return text, EMPTY
