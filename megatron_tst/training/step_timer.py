"""Times the parts of a training step."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class StepTimes:
    """What the parts of one optimizer step took.

    Attributes:
        forward_backward_s: forward and backward passes.
        optimizer_s: the gradient norm and the update.
        communication_s: reducing gradients and gathering parameters, as far as nothing hides it.
    """

    forward_backward_s: float
    optimizer_s: float
    communication_s: float


@dataclass(frozen=True)
class Interval:
    """What lies between two lines of metrics.

    Attributes:
        steps: optimizer steps.
        seconds: what they took, evaluations and saves left out.
        data_s: the part of it that was spent waiting for text.
        forward_backward_s: the part in forward and backward passes.
        optimizer_s: the part that measured the gradient norm and updated weights.
        communication_s: the part that reduced gradients and gathered parameters.
    """

    steps: int
    seconds: float
    data_s: float
    forward_backward_s: float
    optimizer_s: float
    communication_s: float


class StepTimer:
    """Adds up the times of steps from one line of metrics to the next."""

    def __init__(self) -> None:
        """Start the clock."""
        self._all_steps, self._all_pauses_s = 0, 0.0
        self._parts_s: list[float] = []
        self._paused_at_s: float | None = None
        self._restart()

    @property
    def pause_s_per_step(self) -> float:
        """Evaluations and saves since the start, per step."""
        return self._all_pauses_s / max(self._all_steps, 1)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count what happens inside as waiting for text."""
        started_s = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - started_s

    def add(self, times: StepTimes) -> None:
        """Count a step."""
        self._steps += 1
        self._all_steps += 1
        self._parts_s = [total + part for total, part in zip(self._parts_s, astuple(times), strict=True)]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the steps' time."""
        self._paused_at_s = time.perf_counter()
        yield
        pause_s = time.perf_counter() - self._paused_at_s
        self._paused_at_s = None
        self._started_s += pause_s
        self._all_pauses_s += pause_s

    @property
    def seconds(self) -> float:
        """What steps took since the last call of :meth:`take`."""
        return (self._paused_at_s or time.perf_counter()) - self._started_s

    def take(self) -> Interval:
        """Return the times since the last call, and start anew."""
        interval = Interval(self._steps, self.seconds, self._data_s, *self._parts_s)
        self._restart()
        return interval

    def _restart(self) -> None:
        self._started_s = time.perf_counter()
        self._steps, self._data_s = 0, 0.0
        self._parts_s = [0.0, 0.0, 0.0]
