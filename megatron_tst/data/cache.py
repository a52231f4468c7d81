"""Arrays in ``--data-cache-path``: written atomically and flushed to disk, and read without executing anything."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy
from numpy.typing import NDArray

from megatron_tst.config import UserError
from megatron_tst.distributed import run_on_main_rank

logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")


def cached(load: Callable[[], _Found | None], write: Callable[[], None], cache: Path) -> _Found:
    """Return what ``load`` finds in the cache; if it is incomplete, the main rank writes it first.

    Collective: every rank of the world calls it.

    Args:
        load: function that reads the cache; it returns None if something is missing or damaged.
        write: function that writes what ``load`` reads.
        cache: the cache's directory.

    Raises:
        UserError: if the directory cannot be written, or is not the same on all nodes.
    """

    def write_missing() -> None:
        """Write what is missing; only the main rank calls it."""
        if load() is not None:
            return
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            raise UserError(f"--data-cache-path {cache}: cannot be written: {error.strerror or error}") from error

    run_on_main_rank(write_missing)
    found = load()
    if found is None:
        raise UserError(
            f"--data-cache-path {cache}: this node does not find the files that the main rank wrote; "
            "all nodes must share the directory",
            own_rank=True,
        )
    return found


def read_array(path: Path) -> NDArray[Any] | None:
    """Map an array into memory; return None if the file is missing, or damaged, which is logged."""
    if not path.exists():
        return None
    try:
        # Unlike numpy.load, open_memmap reads only .npy files and never unpickles.
        return numpy.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header can raise anything
        logger.warning("WARNING: %s is damaged and will be rebuilt: %s", path, error)
        return None


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array atomically: the file appears complete or not at all, even if the machine crashes."""
    with tempfile.NamedTemporaryFile(prefix=f"{path.name}.partial-", dir=path.parent, delete=False) as file:
        try:
            with _refusal_told(path.parent):
                numpy.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).rename(path)


@contextlib.contextmanager
def _refusal_told(folder: Path) -> Iterator[None]:
    """Raise the operating system's error for a failed write; numpy reports only how much of an array was written."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None:
            raise
        # This comes before anything is deleted, because a deletion frees space.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 22))
        raise


def save_folder(folder: Path, fill: Callable[[Path], None], is_whole: Callable[[], bool]) -> None:
    """Write a directory atomically: it appears complete or not at all, even if the machine crashes.

    Args:
        folder: path of the directory; a damaged one at this path is replaced.
        fill: function that writes the files into the empty directory that it is given.
        is_whole: function that tells whether ``folder`` is complete, for example because another run was faster.
    """
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as room:
        new, old = Path(room) / "new", Path(room) / "old"
        new.mkdir()
        with _refusal_told(folder.parent):
            fill(new)
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            new.rename(folder)
        except OSError:
            if is_whole():
                return
            folder.rename(old)
            new.rename(folder)
