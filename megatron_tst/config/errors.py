"""Errors that the user can fix, and the meaning of a run's exit codes."""

from typing import TypeVar

EXIT_CODE = 2  # a setting or a file cannot be used
EXIT_DIVERGED = 3  # the loss or the gradient was not finite for too many steps in a row
EXIT_RESUMABLE = 75  # stopped early with everything saved; resume with --load (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A setting or a file that a run cannot use; the message is one line that names it, its value and the rule.

    Programs print only the message and exit with the class's code. Most such errors occur on all ranks, and the main
    rank prints them; ``own_rank`` marks an error that may occur on a single rank, which must then print it itself.

    Args:
        message: one line.
        own_rank: whether the error may have occurred on this rank alone.
    """

    exit_code = EXIT_CODE

    def __init__(self, message: str, own_rank: bool = False) -> None:
        """Store the message and whether the error may be this rank's alone."""
        super().__init__(message)
        self.own_rank = own_rank


class StoppedInSetUp(BaseException):
    """A signal stopped the run before its first step; nothing is lost.

    This is not an Exception, so that no handler on the call path mistakes it for an ordinary failure.
    """

    exit_code = EXIT_RESUMABLE


_Value = TypeVar("_Value")


def require(flag: str, value: _Value | None) -> _Value:
    """Return a setting that has no default.

    Raises:
        UserError: if the setting was not given.
    """
    if value is None:
        raise UserError(f"{flag} None: must be given")
    return value


class DivergedError(UserError):
    """Loss or gradient was not finite for too many steps; the last checkpoint was saved before them."""

    exit_code = EXIT_DIVERGED
