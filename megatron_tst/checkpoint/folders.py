"""The directories of a run's checkpoints: a directory with the name of a step is always complete."""

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
    """``iter_0000123/`` for each checkpoint, and a tracker file that names the latest, in the layout of Megatron-LM.

    A checkpoint is written to a directory of another name, which is moved into place when its last byte is on disk.
    Then the tracker is updated. Only one process may call the methods that write.

    Attributes:
        path: parent directory of all checkpoints.
    """

    def __init__(self, path: Path) -> None:
        """Store the path; the first checkpoint creates the directory."""
        self.path = path

    def of(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.path / f"iter_{step:07d}"

    def partial(self, step: int) -> Path:
        """Return the directory in which a step's checkpoint is being written."""
        return self.path / f".partial-iter_{step:07d}"

    @property
    def tracker(self) -> Path:
        """The file that names the step of the latest checkpoint."""
        return self.path / TRACKER

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints in ascending order.

        Raises:
            UserError: if the directory cannot be read.
        """
        if not self.path.is_dir():
            return []
        try:
            names = [_STEP.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir()]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> int | None:
        """Return the step that the tracker names, or None if it is missing or names no step.

        Raises:
            UserError: if the tracker exists but cannot be read.
        """
        try:
            text = self.tracker.read_text(encoding="utf-8", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.tracker}: cannot be read: {error.strerror}") from error
        return int(text) if text.isascii() and text.isdigit() else None

    def begin(self, step: int) -> None:
        """Create the empty directory in which a checkpoint is written.

        Raises:
            UserError: if it cannot be created.
        """
        partial = self.partial(step)
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def publish(self, step: int) -> list[int]:
        """Move a written checkpoint into place, then make the tracker name it.

        An existing checkpoint of the same step is moved aside, not deleted, and so are those of later steps, which
        belong to another course that the run took from an earlier step on.

        Returns:
            The later steps whose checkpoints were moved aside.

        Raises:
            UserError: if something cannot be written; the tracker then still names the previous checkpoint.
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
        """Make the tracker name a step.

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
        """Delete the partially written checkpoint of a failed save."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def remove(self, step: int) -> None:
        """Delete a checkpoint, renaming it first, so that a partially deleted one has no step's name."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.of(step).rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError inside the block to a one-line error that names the file.

    Raises:
        UserError: if the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--save: {error.filename or path} cannot be written: {reason}") from error


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
