"""Whether a picture can be drawn, found out before long work is done for it."""

import importlib.util
from pathlib import Path

from megatron_tst.config import UserError


def check_picture(path: Path, flag: str) -> None:
    """Make the folder of a picture, and refuse one that cannot be drawn.

    Args:
        path: of the picture.
        flag: that named it, for messages.

    Raises:
        UserError: if it is neither PNG nor SVG, its folder cannot be made, or matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{flag} {path}: must end in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} {path}: needs the package matplotlib: pip install matplotlib")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag} {path}: {path.parent} is no folder and cannot be made one: {error.strerror}"
        ) from error
