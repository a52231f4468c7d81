"""Signals that ask a run to stop."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from megatron_tst.config import StoppedInSetUp
from megatron_tst.distributed.parallel_state import any_rank, is_alone

# SIGTERM comes from schedulers and shells, SIGUSR1 from SLURM's --signal=USR1@600.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler signals both torchrun and its ranks, and torchrun forwards the signal, so each rank receives it twice.
ONE_REQUEST_S = 10.0


class StopSignals:
    """Records signals and other requests to stop this process.

    After :meth:`listen`, SIGTERM and SIGUSR1 end the set-up with :class:`StoppedInSetUp`: immediately if the rank works
    alone, otherwise at the next :meth:`check`. After :meth:`hold`, a signal is only recorded, and the training loop
    polls :attr:`request`. Signals within ``ONE_REQUEST_S`` seconds of the first belong to the same request; a later one
    ends the process immediately.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create the record without handling signals yet.

        Args:
            clock: function that returns the time in seconds.
        """
        self.received: str | None = None
        self._clock, self._received_s = clock, 0.0
        self._is_set_up = False
        # If torchrun dies, nothing else tells its ranks. Another parent process may leave its run behind on purpose.
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def listen(self) -> None:
        """Handle the stop signals for the rest of the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def hold(self) -> None:
        """From now on, record signals instead of raising an error."""
        self._is_set_up = True

    def check(self) -> None:
        """End the set-up if any rank has been asked to stop.

        Collective: every rank of the world calls it.

        Raises:
            StoppedInSetUp: on every rank, if any rank has been asked to stop.
        """
        if any(any_rank(self.request is not None)):
            raise _stopped(self.request or "a signal to another rank")

    @property
    def request(self) -> str | None:
        """The reason to stop in words (a signal's name or the end of torchrun), or None."""
        if self.received is None and self._agent is not None and os.getppid() != self._agent:
            return "the end of torchrun"
        return self.received

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_s = signal.Signals(number).name, self._clock()
            if not self._is_set_up and is_alone():
                raise _stopped(self.received)
        elif self._clock() - self._received_s > ONE_REQUEST_S:
            os._exit(128 + number)


def _stopped(reason: str) -> StoppedInSetUp:
    return StoppedInSetUp(f"stopped by {reason} before the first step; start the same command again")


def ignore_stop_signals(_: int = 0) -> None:
    """Ignore the stop signals in this process: in a dataloader worker, or in a run whose exit code is decided.

    SLURM signals every process of a job step. A worker that died of the signal would end the training step that the run
    still has to finish.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
