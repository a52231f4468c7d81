"""Signals that end a program, as an exception: what is half-written is removed on the way out."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedBySignal(BaseException):
    """A signal came.

    Attributes:
        name: of the signal.
        exit_code: 128 and its number, as shells have it.
    """

    def __init__(self, number: int) -> None:
        """Name it."""
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        super().__init__(self.name)


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Within ``with``: the first of ``STOP_SIGNALS`` raises, later ones are ignored.

    A signal that is ignored already stays so: ``nohup`` and shells' background jobs rely on it.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        """Let nothing disturb the way out."""
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
    """Within ``with``: one of ``STOP_SIGNALS`` waits for the end, and processes that are started never hear any.

    Only the main thread may call it.
    """
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        """Keep it for the end: the mask, which processes inherit, is this thread's, and another may be signalled."""
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
