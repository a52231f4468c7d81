"""Signals that ask a run to stop."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

# SIGTERM comes from schedulers and shells, SIGUSR1 from SLURM's --signal=USR1@600.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within ``with``: the first SIGTERM or SIGUSR1 is noted, the second ends the process at once.

    Attributes:
        received: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Start to listen."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave signals as they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name


def ignore_stop_signals(_: int = 0) -> None:
    """Make a loader worker deaf to the stop signals.

    SLURM signals every process of a step: a worker that died of it would take the step along that the run is to finish.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
