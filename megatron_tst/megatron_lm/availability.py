"""Checks that Megatron-LM's trainer is installed."""

import importlib.util

from megatron_tst.config import UserError


def check_available() -> None:
    """Check that Megatron-LM's trainer is installed, without importing it.

    Raises:
        UserError: if the installed megatron-core does not contain it.
    """
    if importlib.util.find_spec("megatron.training") is None:
        raise UserError(
            "--tst-trainer megatron-lm: the installed megatron-core has no megatron.training; 0.19.2 has it, on "
            "Python 3.12 or later"
        )
