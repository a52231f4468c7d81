"""Writing files whole, and finding out whether results can be written before long work is done for them."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.config import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file, which holds the new text or, whatever happens, what it held before.

    Raises:
        OSError: if it cannot be written.
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
    """Make the folder of a file that will be written, and refuse a path at which none can be.

    Args:
        path: of the file.
        flag: that named it, for messages.

    Raises:
        UserError: if it is a folder, cannot be written, or its folder cannot be made.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag} {path}: {path.parent} is no folder and cannot be made one: {error.strerror}"
        ) from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written")


@contextlib.contextmanager
def writing_output(path: Path, flag: str) -> Iterator[None]:
    """Turn what the disk refuses into one line that names the flag.

    Args:
        path: of the file that is written inside.
        flag: that named it, for messages.

    Raises:
        UserError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error


def check_picture(path: Path, flag: str) -> None:
    """Like :func:`check_output` for a picture.

    Args:
        path: of the picture.
        flag: that named it, for messages.

    Raises:
        UserError: if it is neither PNG nor SVG, or matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{flag} {path}: must end in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} {path}: needs the package matplotlib: pip install matplotlib")
    check_output(path, flag)
