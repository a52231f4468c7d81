"""Writes folders that appear whole or not at all, and that record which program wrote them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import megatron_tst
from megatron_tst.checkpoint.folders import writing
from megatron_tst.config import UserError
from megatron_tst.config.locks import locked

MARK = "megatron_tst_conversion.json"


@contextlib.contextmanager
def whole_folder(target: Path, source: Path, needed_bytes: int, force: bool) -> Iterator[Path]:
    """Yield a folder beside ``target`` to write in; it becomes ``target`` if the block ends without an error.

    The folder holds a marker file, which records the program that wrote the folder and lists the files.

    Args:
        target: the folder to create; missing parents are created too.
        source: the folder that the conversion reads.
        needed_bytes: number of bytes that will be written.
        force: whether a ``target`` with the marker and without files that it does not list may be replaced as soon as
            the new folder is complete.

    Raises:
        UserError: if ``target`` must not be replaced or another process writes it, there is too little space, or a
            file cannot be written.
    """
    target = target.resolve()
    if not target.name:
        raise UserError(f"--save {target}: this folder cannot be replaced")
    aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    with locked(target, f"--save {target}"):
        _check_replaceable(target, source, force)
        try:
            with writing(target):
                _check_space(target, needed_bytes)
                shutil.rmtree(aside, ignore_errors=True)  # left over from a process that was killed
                aside.mkdir()
                yield aside
                _write_mark(aside)
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    target.rename(old)
                aside.rename(target)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _write_mark(folder: Path) -> None:
    made_by = f"tools/convert_ckpt.py of megatron-tst {megatron_tst.__version__}"
    mark = {"made_by": made_by, "files": sorted(_files(folder))}
    (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> set[str]:
    """Return the paths of all files and links, relative to the folder."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths}


def _check_space(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise UserError(f"--save {target}: needs {_readable(needed_bytes)}, but {_readable(free)} are free")


def _readable(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def _check_replaceable(target: Path, source: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--save {target}: exists and is not a folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"--save {target}: is not empty; --force replaces it if this tool made it")
    if source.resolve().is_relative_to(target):
        raise UserError(f"--save {target}: contains the folder that --load reads, so --force does not replace it")
    foreign = sorted(_files(target) - _listed(target) - {MARK})
    if foreign:
        raise UserError(
            f"--save {target}: holds {foreign[0]}, which this tool did not write, so --force does not replace it"
        )


def _listed(target: Path) -> set[str]:
    """Return the files that the marker of an earlier conversion lists."""
    try:
        return set(json.loads((target / MARK).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        raise UserError(
            f"--save {target}: holds no {MARK}, so --force does not replace it: name another folder, or delete this "
            "one yourself if an earlier version wrote it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--save {target}: {MARK} cannot be read, so --force does not replace it: {error!r}") from error
