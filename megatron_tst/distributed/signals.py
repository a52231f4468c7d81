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
# A scheduler signals torchrun and its ranks alike, and torchrun passes its signal on to the ranks: it comes twice.
ONE_REQUEST_S = 10.0


class StopSignals:
    """Whether something asks this process to stop.

    Once :meth:`listen` is called, SIGTERM and SIGUSR1 end the set-up by :class:`StoppedInSetUp`: at once in what a rank
    does alone, else at the next :meth:`check`. From :meth:`hold` on the signal is noted for the training loop to ask
    for. Whatever follows the first signal within ``ONE_REQUEST_S`` seconds belongs to it; a later one ends the process
    at once.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Listen to nothing yet.

        Args:
            clock: tells seconds.
        """
        self.received: str | None = None
        self._clock, self._received_s = clock, 0.0
        self._is_set_up = False
        # Nobody else can tell ranks that torchrun is gone. Any other parent may leave its run behind on purpose.
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def listen(self) -> None:
        """Take the signals over for the rest of the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def hold(self) -> None:
        """Note signals from now on instead of raising an error."""
        self._is_set_up = True

    def check(self) -> None:
        """End the set-up if any rank is asked to stop.

        Collective: every rank of the world calls it.

        Raises:
            StoppedInSetUp: on every rank.
        """
        if any(any_rank(self.request is not None)):
            raise _stopped(self.request or "a signal to another rank")

    @property
    def request(self) -> str | None:
        """What asks this process to stop: a signal, torchrun's end, or None."""
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
    """Make this process deaf to the stop signals: a loader worker, or a run whose exit code is decided.

    SLURM signals every process of a step: a worker that died of it would take the step along that the run is to finish.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
