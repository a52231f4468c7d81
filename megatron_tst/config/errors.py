"""The errors that are the user's to mend, and what a run's exit code says."""

from typing import TypeVar

EXIT_CODE = 2  # a setting or a file cannot be used
EXIT_DIVERGED = 3  # loss or gradient stayed not finite
EXIT_RESUMABLE = 75  # stopped before the end, with all saved: start it again with --load (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A setting or a file that a run cannot use; its message is one line naming it, its value and the rule.

    Programs print the message alone and exit with the class's code. Ranks meet most such errors together, and the main
    rank says so for all; ``own_rank`` marks one that a single rank may meet alone and must say itself.

    Args:
        message: the line.
        own_rank: whether other ranks may not have met it.
    """

    exit_code = EXIT_CODE

    def __init__(self, message: str, own_rank: bool = False) -> None:
        """Keep the line."""
        super().__init__(message)
        self.own_rank = own_rank


class StoppedInSetUp(BaseException):
    """A signal asked the run to stop before its first step; nothing is lost.

    Not an Exception: nothing on the way may take it for a failure of its own.
    """

    exit_code = EXIT_RESUMABLE


_Value = TypeVar("_Value")


def require(flag: str, value: _Value | None) -> _Value:
    """Return a setting that has no default.

    Raises:
        UserError: if it was not given.
    """
    if value is None:
        raise UserError(f"{flag} None: must be given")
    return value


class DivergedError(UserError):
    """Training produced no finite number for too many steps; its last checkpoint is from before."""

    exit_code = EXIT_DIVERGED
