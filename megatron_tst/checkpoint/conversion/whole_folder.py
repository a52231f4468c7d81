"""Folders that appear whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.checkpoint.folders import writing
from megatron_tst.config import UserError


@contextlib.contextmanager
def whole_folder(target: Path, needed_bytes: int, force: bool, mark: str) -> Iterator[Path]:
    """Give a folder beside ``target`` to write in; it becomes ``target`` if the block ends without an error.

    Args:
        target: the folder to make; its parents are made too.
        needed_bytes: how much will be written.
        force: whether a ``target`` that is not empty may be replaced, once the new one is whole.
        mark: a file or folder that every such folder holds: without it, ``target`` is something else and stays.

    Raises:
        UserError: if ``target`` may not be replaced, there is too little space, or a file cannot be written.
    """
    _check_replaceable(target, force, mark)
    aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(target, needed_bytes)
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
            aside.mkdir()
            yield aside
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            aside.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_space(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise UserError(f"--save {target}: needs {needed_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free")


def _check_replaceable(target: Path, force: bool, mark: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--save {target}: exists and is not a folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"--save {target}: is not empty; --force replaces it")
    if not (target / mark).exists():
        raise UserError(f"--save {target}: holds no {mark}, so it is something else: --force does not replace it")
