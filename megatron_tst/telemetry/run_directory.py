"""The run directory, which holds all files of a run."""

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
    """The paths of a run's files, and the lock on its directory.

    Attributes:
        path: path of the directory.
    """

    def __init__(self, path: Path) -> None:
        """Store the path; :meth:`occupy` creates the directory."""
        self.path = path
        self._locks: dict[Path, IO[str]] = {}
        self._new: set[Path] = set()

    @property
    def text(self) -> Path:
        """The file that identifies the text of the run; runs from before version 0.2 lack it."""
        return self.path / "text.json"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """File of the resolved settings."""
        return self.path / "config.yaml"

    @property
    def index_cache(self) -> Path:
        """Folder of document and sample indices."""
        return self.path / "index_cache"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, or a link to the folder that ``--save`` names."""
        return self.path / "checkpoints"

    def occupy(self) -> None:
        """Create the directory and lock it against other runs until this process ends or leaves it.

        Raises:
            UserError: if another run uses the directory, or it cannot be written.
        """
        try:
            self._take(self.path)
        except BlockingIOError:
            raise UserError(f"--tst-run-dir {self.path}: another run is using it ({_LOCK})") from None
        except OSError as error:
            raise UserError(f"--tst-run-dir {self.path}: cannot be written: {error.strerror}") from error

    def occupy_checkpoints(self, folder: Path) -> None:
        """Create the folder that the run saves in, and lock it against runs of other directories.

        Raises:
            UserError: if another run saves in the folder, or it cannot be written.
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
        # Do not open the file twice: closing either file object would release the record lock.
        if place not in self._locks:
            self._locks[place] = take_lock(place / _LOCK)

    def refuse_used(self) -> None:
        """Refuse a directory that already holds a run.

        Raises:
            UserError: if the directory holds metrics.
        """
        if self.metrics.exists():
            raise UserError(
                f"--tst-run-dir {self.path}: already holds a run (metrics.jsonl); choose another, or continue with "
                f"--load {self.checkpoints}"
            )

    def touch_metrics(self) -> None:
        """Create the metrics file if it is missing.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            self.metrics.touch()
        except OSError as error:
            raise UserError(f"--tst-run-dir: {self.metrics} cannot be written: {error.strerror}") from error

    def create(self, config_yaml: str, first_step: int) -> None:
        """Record settings and versions, and start to write the package's log lines to ``log.txt`` too.

        Args:
            config_yaml: the settings as YAML.
            first_step: number of steps that are already done; metrics of later steps are dropped, because these steps
                are repeated.

        Raises:
            UserError: if the directory cannot be written.
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

    def record_text(self, *, tokenizer: str, corpora: str) -> None:
        """Record what identifies the text of a run, so that runs can be compared wherever their corpora lie.

        Args:
            tokenizer: SHA-256 of the tokenizer.
            corpora: fingerprint of the corpora.

        Raises:
            UserError: if the directory cannot be written.
        """
        try:
            write_whole(self.text, write_json({"tokenizer": tokenizer, "corpora": corpora}, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--tst-run-dir {self.path}: cannot be written: {error.strerror}") from error

    def link_checkpoints(self, folder: Path) -> None:
        """Make :attr:`checkpoints` a link to the folder of the checkpoints if that is elsewhere.

        Raises:
            UserError: if another folder is in the link's place, or the link cannot be created.
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
            raise UserError(f"--save {folder}: cannot make {link} a link to this folder: {error.strerror}") from error

    def leave(self) -> None:
        """Release the locks, and remove folders that were created for a start that failed."""
        for folder, lock in reversed(self._locks.items()):
            (folder / _LOCK).unlink(missing_ok=True)
            lock.close()
            if folder in self._new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._locks = {}


class _Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current ``sys.stderr``, which a live display replaces to print lines above itself."""

    @property
    def stream(self) -> TextIO:
        """The current standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Ignore the stream that the base class sets."""


class _LogFile(logging.FileHandler):
    """Writes lines to a file until a write fails, which is reported on the screen."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Remove this handler, because flushing its buffer at the end would fail again."""
        package = logging.getLogger("megatron_tst")
        package.removeHandler(self)
        with contextlib.suppress(OSError):
            self.close()
        package.warning("WARNING: %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])


def start_log_screen() -> None:
    """Send the package's log lines to the screen, and close the log files of an earlier run in this process.

    Lines of level DEBUG, whose content the live display shows itself, go only to log.txt.
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
    """Return the versions of Python, of the recorded packages, of this code and of the container image."""
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
