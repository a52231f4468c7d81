"""Times the parts of a training step."""

import contextlib
import time
from collections.abc import Iterator

from megatron_tst.telemetry.run_metrics import Interval, StepTimes


class StepTimer:
    """Adds up the times of the steps between two metric lines.

    Attributes:
        steps: number of steps since the last line.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._all_steps, self._all_pauses_s = 0, 0.0
        self.steps = 0
        self._parts = StepTimes()
        self._paused_at_s: float | None = None
        self._restart()

    @property
    def pause_s_per_step(self) -> float:
        """Time of evaluations and saves since the start, per step."""
        return self._all_pauses_s / max(self._all_steps, 1)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count the time inside the context as waiting for data."""
        started_s = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - started_s

    def add(self, times: StepTimes) -> None:
        """Count a step and add its times."""
        self.steps += 1
        self._all_steps += 1
        self._parts += times

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context from the time of the steps."""
        self._paused_at_s = time.perf_counter()
        yield
        pause_s = time.perf_counter() - self._paused_at_s
        self._paused_at_s = None
        self._started_s += pause_s
        self._all_pauses_s += pause_s

    @property
    def seconds(self) -> float:
        """Time of the steps since the last call of :meth:`take`."""
        return (self._paused_at_s or time.perf_counter()) - self._started_s

    def take(self) -> Interval:
        """Return the times since the last call, and restart."""
        interval = Interval(self.steps, self.seconds, self._data_s, self._parts)
        self._restart()
        return interval

    def _restart(self) -> None:
        self._started_s = time.perf_counter()
        self.steps, self._data_s = 0, 0.0
        self._parts = StepTimes()
