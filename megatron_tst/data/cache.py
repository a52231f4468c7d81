"""Arrays kept in ``--data-cache-path``: written whole and to the disk, read without executing anything."""

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
    """Return what ``load`` finds in the cache; where that is not whole, the main rank writes it first.

    Collective: every rank of the world calls it.

    Args:
        load: reads the cache; returns None where something is missing or damaged.
        write: writes what ``load`` reads.
        cache: the folder.

    Raises:
        UserError: if the folder cannot be written, or is not the same on all nodes.
    """

    def write_missing() -> None:
        """Write on the main rank alone."""
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
            f"--data-cache-path {cache}: this node does not find what the main rank wrote there: "
            "all nodes must share the folder",
            own_rank=True,
        )
    return found


def read_array(path: Path) -> NDArray[Any] | None:
    """Map an array into memory; returns None where there is none, or it is damaged, which is said."""
    if not path.exists():
        return None
    try:
        # Unlike numpy.load, it knows no format but .npy and never unpickles.
        return numpy.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header can raise anything
        logger.warning("WARNING: %s is damaged, and made anew: %s", path, error)
        return None


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array so that the file appears complete or not at all, also after a crash of the machine."""
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
    """Have an error say why the disk took no more: numpy tells only how much of an array it took."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None:
            raise
        # Nothing may be deleted before: there would be space again.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 22))
        raise


def save_folder(folder: Path, fill: Callable[[Path], None], is_whole: Callable[[], bool]) -> None:
    """Write a folder of files so that it appears complete or not at all, also after a crash of the machine.

    Args:
        folder: its place; a damaged one that lies there is removed.
        fill: writes the files into the empty folder that it is given.
        is_whole: whether the folder lies in its place complete, as when another run was quicker to fill it.
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
