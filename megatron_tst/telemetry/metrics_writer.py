"""Writes each metric line to ``metrics.jsonl`` and hands it to TensorBoard and wandb."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_tst.telemetry.metrics import Metrics, MetricsFile
from megatron_tst.telemetry.sinks import BackgroundSink, numbers


class MetricsWriter:
    """Writes metric lines on the main rank.

    A failure to write does not raise an error here, because an error on a single rank would leave the other ranks
    waiting and the run unsaved. Nothing is written after the first failure, and the run checks :attr:`failure` between
    steps.

    Attributes:
        failure: why a line could not be written; None if all lines were written.
    """

    def __init__(self, path: Path, sinks: Sequence[BackgroundSink]) -> None:
        """Open the file for appending.

        Args:
            path: path of ``metrics.jsonl``.
            sinks: further sinks that receive the lines.
        """
        self._file, self._sinks = MetricsFile(path), sinks
        self.failure: str | None = None

    def write(self, metrics: Metrics) -> None:
        """Write a line and offer it to the sinks."""
        if self.failure is None:
            with self._noting_failure():
                self._file.write(metrics)
        for sink in self._sinks:
            sink.offer(numbers(metrics))

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        with self._noting_failure():
            self._file.sync()

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error.strerror

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()
