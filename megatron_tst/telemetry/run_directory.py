"""The run directory: everything that a run leaves behind."""

import importlib.metadata
import json
import logging
import platform as python_platform
import subprocess
import sys
from pathlib import Path

from megatron_tst.config import UserError

RECORDED_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers")


class RunDirectory:
    """Names the files of a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        """Name the folder; :meth:`create` makes it."""
        self.path = path

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

    def create(self, config_yaml: str) -> None:
        """Make the folder and record settings and versions in it.

        Raises:
            UserError: if it already holds a run or cannot be written.
        """
        if self.metrics.exists():
            raise UserError(f"--tst-run-dir {self.path}: already holds a run (metrics.jsonl); choose another")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config.write_text(config_yaml, encoding="utf-8")
            (self.path / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--tst-run-dir {self.path}: cannot be written: {error}") from error

    def start_logging(self) -> None:
        """Send the package's log lines to the screen and to ``log.txt``."""
        formatter = logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        handlers = logging.StreamHandler(), logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        package = logging.getLogger("megatron_tst")
        package.setLevel(logging.INFO)
        # A process may train one run after another: each has the log to itself.
        for handler in list(package.handlers):
            package.removeHandler(handler)
            handler.close()
        for handler in handlers:
            handler.setFormatter(formatter)
            package.addHandler(handler)


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of the packages that compute, and of this code."""
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
    return found
