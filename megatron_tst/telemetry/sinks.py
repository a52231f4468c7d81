"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, never in training's way."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_tst.config import LoggingSettings, UserError
from megatron_tst.telemetry.run_directory import RunDirectory

logger = logging.getLogger(__name__)

CAPACITY_LINES = 1000
CLOSING_S = 30.0
AXES = ("step", "data_tokens", "positions")
LOSSES = ("loss", "valid_loss")
Values = Mapping[str, float]


class Writer(Protocol):
    """What takes lines of numbers, each with its step."""

    def write(self, values: Values) -> None:
        """Take a line."""

    def close(self) -> None:
        """Hand over what is held back."""


class BackgroundSink:
    """A writer in a thread of its own, behind a bounded queue: a slow or dead service drops lines, not steps."""

    def __init__(self, name: str, connect: Callable[[], Writer], capacity: int = CAPACITY_LINES) -> None:
        """Start to connect.

        Args:
            name: of the service, for messages.
            connect: opens the writer, in the thread.
            capacity: lines that may wait.
        """
        self._name, self._connect = name, connect
        self._lines: queue.Queue[Values | None] = queue.Queue(capacity)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def offer(self, values: Values) -> None:
        """Hand over a line, or drop it if too many wait; returns at once."""
        try:
            self._lines.put_nowait(values)
        except queue.Full:
            if not self._dropped:
                logger.warning("WARNING: %s is too slow: lines are dropped there; metrics.jsonl has all", self._name)
            self._dropped += 1

    def close(self, timeout_s: float = CLOSING_S) -> None:
        """Wait for the lines that were taken, for a while."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        left = self._dropped + (self._lines.qsize() if self._thread.is_alive() else 0)
        if left:
            logger.warning("WARNING: %s missed %d lines; metrics.jsonl has them", self._name, left)

    def _run(self) -> None:
        """Write what is offered until the end is; after an error, take and forget it."""
        writer: Writer | None = None
        try:
            writer = self._connect()
        except Exception as error:  # whatever a service does, the run goes on
            self._give_up(error)
        while (values := self._lines.get()) is not None:
            if writer is None:
                self._dropped += 1
                continue
            try:
                writer.write(values)
            except Exception as error:
                self._give_up(error)
                self._dropped += 1
                writer = None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("WARNING: %s: %s; the run goes on without it", self._name, _first_line(error))


class TensorBoard:
    """All scalars by step, and the losses by data tokens and by positions in folders of their own."""

    def __init__(self, folder: Path, done: Values) -> None:
        """Open event files; what an earlier start wrote beyond ``done`` is hidden.

        Args:
            folder: of the event files.
            done: per axis, where the run stands.
        """
        from torch.utils.tensorboard import SummaryWriter

        folders = {axis: folder if axis == "step" else folder / f"by_{axis}" for axis in AXES}
        self._writers = {axis: SummaryWriter(str(folders[axis]), purge_step=int(done[axis]) + 1) for axis in AXES}

    def write(self, values: Values) -> None:
        """Write a line."""
        for axis in AXES:
            for name, value in values.items():
                if axis in values and name not in AXES and (axis == "step" or name in LOSSES):
                    self._writers[axis].add_scalar(name, value, int(values[axis]))

    def close(self) -> None:
        """Flush the event files."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """A run there that keeps its identity over all starts of the run here."""

    def __init__(self, settings: LoggingSettings, directory: RunDirectory, facts: Mapping[str, Any]) -> None:
        """Begin or go on; without a key, offline.

        Args:
            settings: project, name, entity and folder.
            directory: of the run; keeps the identity.
            facts: settings and versions to show.
        """
        import wandb

        identity = directory.path / "wandb_run_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            name=settings.wandb_exp_name or directory.path.name,
            dir=settings.wandb_save_dir or str(directory.path),
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(facts),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        # Any of these is an axis to draw over; a run that goes on from an earlier step may write a step again.
        for axis in AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            logger.info("wandb: offline, in %s; `wandb sync` sends it later", self._run.dir)

    def write(self, values: Values) -> None:
        """Write a line."""
        self._run.log(dict(values))

    def close(self) -> None:
        """End this start of the run."""
        self._run.finish()


def numbers(metrics: Any) -> dict[str, float]:
    """Return the numbers of a line of metrics; a list, one per layer, and a mapping become names of their own."""
    flat: dict[str, float] = {}
    for name, value in dataclasses.asdict(metrics).items():
        if isinstance(value, list):
            flat.update({f"{name}/layer{layer}": float(item) for layer, item in enumerate(value)})
        elif isinstance(value, dict):
            flat.update({f"{name}/{key}": float(item) for key, item in value.items()})
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


def open_sinks(
    settings: LoggingSettings, directory: RunDirectory, facts: Mapping[str, Any], done: Values
) -> list[BackgroundSink]:
    """Open the sinks that the settings ask for.

    Args:
        settings: which.
        directory: of the run.
        facts: settings and versions, for Weights & Biases.
        done: steps, data tokens and positions that are done already.
    """
    sinks = []
    if settings.tensorboard_dir is not None:
        folder = Path(settings.tensorboard_dir)
        threading.excepthook = _spare_the_screen(threading.excepthook)
        sinks.append(BackgroundSink("TensorBoard", lambda: TensorBoard(folder, done)))
    if settings.wandb_project is not None:
        sinks.append(BackgroundSink("Weights & Biases", lambda: WeightsAndBiases(settings, directory, facts)))
    return sinks


def _spare_the_screen(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
    """Return a hook that tells no traceback of TensorBoard's thread: the next line offered there meets its error."""

    def told(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    return told


def check_sinks(settings: LoggingSettings) -> None:
    """Find out before the first step whether the packages are there.

    Raises:
        UserError: naming the flag and the package.
    """
    for flag, wanted, package in (
        ("--tensorboard-dir", settings.tensorboard_dir, "tensorboard"),
        ("--wandb-project", settings.wandb_project, "wandb"),
    ):
        if wanted is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} {wanted}: needs the package {package}: pip install {package}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
