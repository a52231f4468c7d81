"""Locks on outputs: they keep a second process from writing the same output, and end with their process."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_tst.config.errors import UserError


def take_lock(path: Path) -> IO[str]:
    """Lock a file until it is closed; create the file if it is missing.

    The kernel releases a record lock when the process ends, however it ends. Unlike a lock of flock, it is not
    inherited by child processes, and network file systems enforce it across machines.

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
        file.close()  # the previous holder removed the file after it was opened here and before it was locked


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(output: Path, flag: str) -> Iterator[None]:
    """Keep other processes from writing the same output; ``OUTPUT.lock`` exists beside it in the meantime.

    Args:
        output: path of the output; its directory is created if it is missing.
        flag: the flag that named the output, with its value, for messages.

    Raises:
        UserError: if another process is writing the output, or its directory cannot be written.
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
