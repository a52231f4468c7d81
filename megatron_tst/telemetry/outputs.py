"""Writes files atomically, and checks before long work whether its results can be written."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.config import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: if anything fails, the file keeps its previous content.

    Raises:
        OSError: if the file cannot be written.
    """
    aside = path.with_name(f".partial-{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def check_output(path: Path, flag: str) -> None:
    """Create the folder of an output file, and check that the file can be written.

    Args:
        path: path of the file.
        flag: flag that named the file, for messages.

    Raises:
        UserError: if the path is a folder, the file cannot be written, or its folder cannot be created.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot create the folder {path.parent}: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written")


@contextlib.contextmanager
def writing_output(path: Path, flag: str) -> Iterator[None]:
    """Turn errors of writing a file into one line that names the flag.

    Args:
        path: path of the file that is written inside the context.
        flag: flag that named the file, for messages.

    Raises:
        UserError: if the context raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error


def check_picture(path: Path, flag: str) -> None:
    """Check, in addition to :func:`check_output`, that a plot can be drawn.

    Args:
        path: path of the plot.
        flag: flag that named the plot, for messages.

    Raises:
        UserError: if the file is neither PNG nor SVG, or matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{flag} {path}: must end in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} {path}: needs the package matplotlib: pip install matplotlib")
    check_output(path, flag)
