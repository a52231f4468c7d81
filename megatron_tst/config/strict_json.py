"""A JSON writer whose output every parser accepts.

Python's own writer emits ``NaN`` and ``Infinity``, which are not JSON, and lone surrogates, which UTF-8 text cannot
hold; strict parsers reject the whole document for either.
"""

import json
import math
from typing import Any


def write_json(content: Any, indent: int | None = None) -> str:
    r"""Return content as JSON, with null for numbers that are not finite and the text ``\uXXXX`` for lone surrogates.

    Args:
        content: nested dicts, lists, tuples, strings, numbers, booleans and None.
        indent: spaces per level; everything is on one line if not given.
    """
    return json.dumps(_strict(content), indent=indent, allow_nan=False)


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {_strict(key): _strict(item) for key, item in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(item) for item in content]
    if isinstance(content, str):
        # Python represents a byte of a file name or argument that is not UTF-8 as a lone surrogate.
        return content.encode("utf-8", "backslashreplace").decode("utf-8")
    return None if isinstance(content, float) and not math.isfinite(content) else content
