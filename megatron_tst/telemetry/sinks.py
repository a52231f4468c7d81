"""Sends metrics to TensorBoard and Weights & Biases on background threads; an outage never blocks training."""

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
    """A destination of metric lines, each of which holds its step."""

    def write(self, values: Values) -> None:
        """Write one line."""

    def close(self) -> None:
        """Flush buffered lines and close."""


class BackgroundSink:
    """A writer on a background thread behind a bounded queue; if a service is slow or down, lines are dropped."""

    def __init__(self, name: str, connect: Callable[[], Writer], capacity: int = CAPACITY_LINES) -> None:
        """Start the thread, which connects to the service.

        Args:
            name: name of the service, for messages.
            connect: function that opens the writer; called on the thread.
            capacity: largest number of waiting lines.
        """
        self._name, self._connect = name, connect
        self._lines: queue.Queue[Values | None] = queue.Queue(capacity)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def offer(self, values: Values) -> None:
        """Queue a line, or drop it if the queue is full; never blocks."""
        try:
            self._lines.put_nowait(values)
        except queue.Full:
            if not self._dropped:
                logger.warning("WARNING: %s is too slow and misses lines; metrics.jsonl has all of them", self._name)
            self._dropped += 1

    def close(self, timeout_s: float = CLOSING_S) -> None:
        """Wait until the queued lines are written, at most for the timeout."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        left = self._dropped + (self._lines.qsize() if self._thread.is_alive() else 0)
        if left:
            logger.warning("WARNING: %s missed %d lines; metrics.jsonl has them", self._name, left)

    def _run(self) -> None:
        """Write queued lines until the end marker; after an error, count and discard them."""
        writer: Writer | None = None
        try:
            writer = self._connect()
        except Exception as error:  # the run continues whatever a service does
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
        logger.warning("WARNING: %s: %s; the run continues without it", self._name, _first_line(error))


class TensorBoard:
    """Writes all scalars by step, and the losses also by data tokens and by positions in folders of their own."""

    def __init__(self, folder: Path, done: Values) -> None:
        """Open the event files; points of an earlier start beyond ``done`` are hidden.

        Args:
            folder: folder of the event files.
            done: current value of each axis.
        """
        from torch.utils.tensorboard import SummaryWriter

        folders = {axis: folder if axis == "step" else folder / f"by_{axis}" for axis in AXES}
        self._writers = {axis: SummaryWriter(str(folders[axis]), purge_step=int(done[axis]) + 1) for axis in AXES}

    def write(self, values: Values) -> None:
        """Write one line."""
        for axis in AXES:
            for name, value in values.items():
                if axis in values and name not in AXES and (axis == "step" or name in LOSSES):
                    self._writers[axis].add_scalar(name, value, int(values[axis]))

    def close(self) -> None:
        """Flush the event files."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """Writes to one run of Weights & Biases, which keeps its id over all starts of our run."""

    def __init__(self, settings: LoggingSettings, directory: RunDirectory, facts: Mapping[str, Any]) -> None:
        """Create or resume the run; without an API key, it is recorded offline.

        Args:
            settings: project, name, entity and folder.
            directory: run directory, which stores the id.
            facts: settings and versions to record.
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
        # Each of these can be the x axis; a run that continues from an earlier step may write a step twice.
        for axis in AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            logger.info("wandb: recording offline in %s; `wandb sync` uploads it later", self._run.dir)

    def write(self, values: Values) -> None:
        """Write one line."""
        self._run.log(dict(values))

    def close(self) -> None:
        """Finish the run of Weights & Biases."""
        self._run.finish()


def numbers(metrics: Any) -> dict[str, float]:
    """Return the numbers of a metric line; each item of a list (one per layer) or mapping gets its own name."""
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
    """Open the sinks that the settings request.

    Args:
        settings: settings that name the sinks.
        directory: run directory.
        facts: settings and versions, for Weights & Biases.
        done: steps, data tokens and positions that are already done.
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
    """Return a hook that prints no traceback of TensorBoard's thread; its error is reported at the next line."""

    def told(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    return told


def check_sinks(settings: LoggingSettings) -> None:
    """Check before the first step that the required packages are installed.

    Raises:
        UserError: naming the flag and the missing package.
    """
    for flag, wanted, package in (
        ("--tensorboard-dir", settings.tensorboard_dir, "tensorboard"),
        ("--wandb-project", settings.wandb_project, "wandb"),
    ):
        if wanted is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} {wanted}: needs the package {package}: pip install {package}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
