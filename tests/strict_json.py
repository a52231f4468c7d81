"""A strict JSON reader, which refuses what Python's own reader accepts beyond RFC 8259 and UTF-8."""

import json
from typing import Any


def read_strictly(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    # A lone surrogate is not a character and cannot be encoded.
    json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content
