"""Decides when a run stops before its end."""

import time

from megatron_tst.config import CheckpointSettings, DivergedError
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.training.step import StepReport


class StopConditions:
    """The conditions under which this rank asks the run to save and stop."""

    def __init__(self, settings: CheckpointSettings, signals: StopSignals) -> None:
        """Start the clock."""
        self._settings, self._signals = settings, signals
        self._started_s = time.monotonic()

    def reason(self, step: int) -> str | None:
        """Return why the run should stop after ``step`` steps, or None."""
        minutes, interval = self._settings.exit_duration_in_mins, self._settings.exit_interval
        if self._signals.request:
            return self._signals.request
        if minutes is not None and time.monotonic() - self._started_s > minutes * 60:
            return f"--exit-duration-in-mins {minutes:g}"
        if interval is not None and step % interval == 0:
            return f"--exit-interval {interval}"
        return None


class DivergenceGuard:
    """Ends a run whose loss or gradient is not finite for too many steps in a row."""

    def __init__(self, max_skipped: int) -> None:
        """Allow fewer than ``max_skipped`` skipped steps in a row."""
        self._max_skipped, self._skipped = max_skipped, 0

    def check(self, step: int, report: StepReport) -> None:
        """Count a step, and raise an error after too many skipped steps in a row.

        Raises:
            DivergedError: on every rank, as soon as ``max_skipped`` steps in a row were not applied.
        """
        self._skipped = 0 if report.is_applied else self._skipped + 1
        if self._skipped >= self._max_skipped:
            raise DivergedError(
                f"--max-nan-steps {self._max_skipped}: loss or gradient was not finite in the last {self._skipped} "
                f"steps, up to step {step}; the saved checkpoints are from earlier steps"
            )
