"""Locks on outputs: a second process that would write the same is refused, and none outlives its process."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_tst.config.errors import UserError


def take_lock(path: Path) -> IO[str]:
    """Lock a file until it is closed, making it where it is missing.

    The kernel lets go of a record lock when the process ends, however it ends. Unlike flock's, it is not held on by
    child processes, and network file systems pass it on to the other machines.

    Raises:
        BlockingIOError: if another process holds the lock.
        OSError: if the file cannot be written.
    """
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise BlockingIOError(f"{path} is locked") from None
        except OSError as error:
            logging.getLogger(__name__).warning(
                "WARNING: %s cannot be locked on this file system: %s", path.name, error
            )
            return file
        if _lies_at(file, path):
            return file
        file.close()  # its holder removed it between the opening and the lock


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(output: Path, flag: str) -> Iterator[None]:
    """Keep other processes from writing the same output; ``OUTPUT.lock`` stands beside it for as long.

    Args:
        output: path of the output, whose folder is made where it is missing.
        flag: that named it, with its value, for messages.

    Raises:
        UserError: if another process writes it, or its folder cannot be written.
    """
    path = output.with_name(f"{output.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = take_lock(path)
    except BlockingIOError:
        raise UserError(f"{flag}: another process is writing it ({path.name} is locked)") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot be written: {error}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
