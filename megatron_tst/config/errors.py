"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """A setting or a file that a run cannot use; its message is one line naming it, its value and the rule.

    Programs print the message alone and exit with code 2.
    """


EXIT_CODE = 2
