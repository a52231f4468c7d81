"""The run directory: everything that a run leaves behind."""

import contextlib
import importlib.metadata
import logging
import os
import platform as python_platform
import subprocess
import sys
from pathlib import Path
from typing import IO, TextIO

from megatron_tst.config import UserError, write_json
from megatron_tst.config.locks import take_lock
from megatron_tst.telemetry.metrics import cut_metrics
from megatron_tst.telemetry.outputs import write_whole

RECORDED_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "tokenizers")
_LOCK = "run.lock"


class RunDirectory:
    """Names the files of a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        """Name the folder; :meth:`occupy` makes it."""
        self.path = path
        self._locks: dict[Path, IO[str]] = {}
        self._new: set[Path] = set()

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def index_cache(self) -> Path:
        """Document and sample indices."""
        return self.path / "index_cache"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints: a folder or, where ``--save`` names another place, a link to it."""
        return self.path / "checkpoints"

    def occupy(self) -> None:
        """Make the folder and keep every other run out of it, for as long as this process lives.

        Raises:
            UserError: if another run is in it, or it cannot be written.
        """
        try:
            self._take(self.path)
        except BlockingIOError:
            raise UserError(f"--tst-run-dir {self.path}: another run is in it ({_LOCK})") from None
        except OSError as error:
            raise UserError(f"--tst-run-dir {self.path}: cannot be written: {error.strerror}") from error

    def occupy_checkpoints(self, folder: Path) -> None:
        """Make the folder that the run saves in, and keep out of it every run of another directory.

        Raises:
            UserError: if another run saves there, or it cannot be written.
        """
        try:
            self._take(folder)
        except BlockingIOError:
            raise UserError(f"--save {folder}: another run saves there ({_LOCK})") from None
        except OSError as error:
            raise UserError(f"--save: {folder} cannot be written: {error.strerror}") from error

    def _take(self, folder: Path) -> None:
        place = folder.resolve()
        if not place.exists():
            self._new.add(place)
        folder.mkdir(parents=True, exist_ok=True)
        # Opened a second time, a file loses its record lock when either is closed.
        if place not in self._locks:
            self._locks[place] = take_lock(place / _LOCK)

    def refuse_used(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            UserError: if it does.
        """
        if self.metrics.exists():
            raise UserError(
                f"--tst-run-dir {self.path}: already holds a run (metrics.jsonl); choose another, or go on with "
                f"--load {self.checkpoints}"
            )

    def create(self, config_yaml: str, first_step: int) -> None:
        """Record settings and versions, and send the package's log lines to ``log.txt`` too.

        Args:
            config_yaml: the settings.
            first_step: steps that are done already: metrics of later ones, which will be done again, are dropped.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            if self.metrics.exists():
                cut_metrics(self.metrics, first_step)
            write_whole(self.config, config_yaml)
            write_whole(self.path / "versions.json", write_json(versions(), indent=2) + "\n")
            _add_handler(_LogFile(self.path / "log.txt", encoding="utf-8"))
            self._new.clear()
        except OSError as error:
            raise UserError(f"--tst-run-dir {self.path}: cannot be written: {error.strerror}") from error

    def link_checkpoints(self, folder: Path) -> None:
        """Let :attr:`checkpoints` lead to the folder that they are saved in, so that they are found from here.

        Raises:
            UserError: if there is another folder, or the link cannot be made.
        """
        link = self.checkpoints
        if link.resolve() == folder.resolve():
            return
        try:
            if link.is_symlink():
                link.unlink()
            elif link.exists():
                link.rmdir()
            link.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError as error:
            raise UserError(f"--save {folder}: {link} cannot be made a link to it: {error.strerror}") from error

    def leave(self) -> None:
        """Let other runs in; folders that were made for a start that came to nothing are removed."""
        for folder, lock in reversed(self._locks.items()):
            (folder / _LOCK).unlink(missing_ok=True)
            lock.close()
            if folder in self._new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._locks = {}


class _Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error as it is now: a live display takes it over and prints lines above itself."""

    @property
    def stream(self) -> TextIO:
        """Standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """The base class wants to set it."""


class _LogFile(logging.FileHandler):
    """Writes lines until the disk refuses one, which is said on the screen."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on without the file, whose buffer would be refused again at the end."""
        package = logging.getLogger("megatron_tst")
        package.removeHandler(self)
        with contextlib.suppress(OSError):
            self.close()
        package.warning("WARNING: %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])


def start_log_screen() -> None:
    """Send the package's log lines to the screen, and no longer to the files of a run before.

    Lines of level DEBUG, which the live display shows in its own way, go to log.txt alone.
    """
    package = logging.getLogger("megatron_tst")
    package.setLevel(logging.DEBUG)
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    _add_handler(_Screen(), logging.INFO)


def _add_handler(handler: logging.Handler, level: int = logging.DEBUG) -> None:
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.getLogger("megatron_tst").addHandler(handler)


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of the packages that compute, of this code and of the image it is in."""
    found: dict[str, str | None] = {"python": python_platform.python_version(), "command": " ".join(sys.argv)}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    describe = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    try:
        git = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        git = ""
    found["git"] = git or None
    found["image"] = os.environ.get("TST_IMAGE_VERSION") or None
    return found
