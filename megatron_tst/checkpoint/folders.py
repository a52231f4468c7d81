"""The folders of a run's checkpoints: a folder that carries a step's name is whole, whatever happened."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tst.config import UserError

TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"iter_(\d{7,})")


class CheckpointFolders:
    """``iter_0000123/`` for each checkpoint, and a tracker file that names the latest, as Megatron-LM lays them out.

    A checkpoint is written to a folder of another name, which is moved into place when its last byte is on disk; the
    tracker follows. Only one process may call what writes.

    Attributes:
        path: holds the folders.
    """

    def __init__(self, path: Path) -> None:
        """Name the folder; the first checkpoint makes it."""
        self.path = path

    def of(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.path / f"iter_{step:07d}"

    def partial(self, step: int) -> Path:
        """Return the folder in which a step's checkpoint is being written."""
        return self.path / f".partial-iter_{step:07d}"

    @property
    def tracker(self) -> Path:
        """The file that names the latest checkpoint's step."""
        return self.path / TRACKER

    def steps(self) -> list[int]:
        """Return the steps of all whole checkpoints, ascending.

        Raises:
            UserError: if the folder cannot be read.
        """
        if not self.path.is_dir():
            return []
        try:
            names = [_STEP.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir()]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> int | None:
        """Return the step that the tracker names; None without a tracker that names one.

        Raises:
            UserError: if there is a tracker that cannot be read.
        """
        try:
            text = self.tracker.read_text(encoding="utf-8", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.tracker}: cannot be read: {error.strerror}") from error
        return int(text) if text.isascii() and text.isdigit() else None

    def begin(self, step: int) -> None:
        """Make the empty folder to write a checkpoint in.

        Raises:
            UserError: if it cannot be made.
        """
        partial = self.partial(step)
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def publish(self, step: int) -> list[int]:
        """Move a written checkpoint into place, then let the tracker name it.

        A checkpoint of the same step that is there already is moved aside, not deleted, and so are those of later
        steps: the run that wrote them went another way from an earlier step on.

        Returns:
            The later steps whose checkpoints were moved aside.

        Raises:
            UserError: if files or folders cannot be written; the tracker then still names the one before.
        """
        partial, folder = self.partial(step), self.of(step)
        with writing(folder):
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            if folder.exists():
                self._move_aside(step)
            partial.rename(folder)
            sync(self.path)
        self.point_to(step)
        later = [other for other in self.steps() if other > step]
        for other in later:
            with writing(self.of(other)):
                self._move_aside(other)
        return later

    def _move_aside(self, step: int) -> None:
        folder = self.of(step)
        replaced = folder.with_name(f"{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)

    def point_to(self, step: int) -> None:
        """Let the tracker name a step.

        Raises:
            UserError: if the tracker cannot be written.
        """
        with writing(self.tracker):
            aside = self.tracker.with_name(f".partial-{TRACKER}")
            aside.write_text(str(step), encoding="utf-8")
            sync(aside)
            aside.replace(self.tracker)
            sync(self.path)

    def abandon(self, step: int) -> None:
        """Delete what was written of a checkpoint that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def remove(self, step: int) -> None:
        """Delete a checkpoint; half deleted it carries no step's name any more."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.of(step).rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that names the file.

    Raises:
        UserError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--save: {error.filename or path} cannot be written: {reason}") from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
