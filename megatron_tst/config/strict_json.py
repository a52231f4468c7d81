"""JSON that every parser reads.

Python's own writer puts down ``NaN`` and ``Infinity``, which are not JSON, and halves of surrogate pairs, which no
UTF-8 text can hold; strict parsers refuse the whole document for either.
"""

import json
import math
from typing import Any


def write_json(content: Any, indent: int | None = None) -> str:
    """Write content as JSON: a number that is not finite as null, half of a surrogate pair as its code in letters.

    Args:
        content: dicts, lists, tuples, strings, numbers, booleans and None, nested.
        indent: spaces per level; all on one line where not given.
    """
    return json.dumps(_strict(content), indent=indent, allow_nan=False)


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {_strict(key): _strict(item) for key, item in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(item) for item in content]
    if isinstance(content, str):
        # Python keeps a byte of a file name or argument that is not UTF-8 as half of a pair.
        return content.encode("utf-8", "backslashreplace").decode("utf-8")
    return None if isinstance(content, float) and not math.isfinite(content) else content
