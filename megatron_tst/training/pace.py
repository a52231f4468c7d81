"""How long steps take, and what in them does."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tst.training.step import StepReport


@dataclass(frozen=True)
class Interval:
    """What lies between two lines of metrics.

    Attributes:
        steps: optimizer steps.
        seconds: they took, evaluations and saves left out.
        data_s: of these, waiting for text.
        forward_backward_s: of these, in forward and backward passes.
        optimizer_s: of these, measuring the gradient norm and updating weights.
        communication_s: of these, reducing gradients and gathering parameters.
    """

    steps: int
    seconds: float
    data_s: float
    forward_backward_s: float
    optimizer_s: float
    communication_s: float


class Pace:
    """Adds up the times of steps from one line to the next."""

    def __init__(self) -> None:
        """Start the clock."""
        self._all_steps, self._all_pauses_s = 0, 0.0
        self._paused_at_s: float | None = None
        self._restart()

    @property
    def pause_s_per_step(self) -> float:
        """Evaluations and saves since the start, per step."""
        return self._all_pauses_s / max(self._all_steps, 1)

    def add(self, data_s: float, report: StepReport) -> None:
        """Count a step; ``data_s`` is how long it waited for text."""
        self._steps += 1
        self._all_steps += 1
        self._data_s += data_s
        self._forward_backward_s += report.forward_backward_s
        self._optimizer_s += report.optimizer_s
        self._communication_s += report.communication_s

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
        interval = Interval(
            self._steps, self.seconds, self._data_s, self._forward_backward_s, self._optimizer_s, self._communication_s
        )
        self._restart()
        return interval

    def _restart(self) -> None:
        self._started_s = time.perf_counter()
        self._steps = 0
        self._data_s = self._forward_backward_s = self._optimizer_s = self._communication_s = 0.0
