"""Signals that end a program raise an exception, so that partially written files are removed."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedBySignal(BaseException):
    """A signal interrupted the program.

    Attributes:
        name: the signal's name.
        exit_code: 128 plus the signal's number, as in shells.
    """

    def __init__(self, number: int) -> None:
        """Create the exception for a signal's number."""
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        super().__init__(self.name)


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Inside the block, the first of ``STOP_SIGNALS`` raises :class:`InterruptedBySignal`; later ones are ignored.

    A signal that is already ignored stays ignored, on which ``nohup`` and background jobs of shells rely.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        """Ignore further signals, so that they do not disturb the clean-up, and raise."""
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise InterruptedBySignal(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def holding_back() -> Iterator[None]:
    """Inside the block, ``STOP_SIGNALS`` are deferred to its end; processes started in it never receive any of them.

    Only the main thread may call it.
    """
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        """Record the signal: the mask, which child processes inherit, covers only this thread, not the others."""
        came.append(number)

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, note)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
