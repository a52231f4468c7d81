"""Whether Megatron-LM's trainer is installed."""

import importlib.metadata
import importlib.util

from megatron_tst.config import UserError


def check_available() -> None:
    """Look for Megatron-LM's trainer without importing it.

    Raises:
        UserError: if the installed megatron-core does not have it.
    """
    if importlib.util.find_spec("megatron.training") is None:
        installed = importlib.metadata.version("megatron-core")
        raise UserError(
            f"--tst-trainer megatron-lm: megatron-core {installed} comes without megatron.training; it is in 0.19.2, "
            "on Python 3.12 or later"
        )
