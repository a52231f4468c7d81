"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """A setting or a file that a run cannot use; its message is one line naming it, its value and the rule.

    Programs print the message alone and exit with code 2. Ranks meet most such errors together, and the main rank says
    so for all; ``own_rank`` marks one that a single rank may meet alone and must say itself.

    Args:
        message: the line.
        own_rank: whether other ranks may not have met it.
    """

    def __init__(self, message: str, own_rank: bool = False) -> None:
        """Keep the line."""
        super().__init__(message)
        self.own_rank = own_rank


EXIT_CODE = 2
