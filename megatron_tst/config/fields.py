"""Strict type checking: a YAML value must have exactly the type that the dataclass declares for its field."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_tst.config.errors import UserError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def read_fields(hints: Mapping[str, Any], values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Return the values as a dataclass stores them: lists as tuples, and whole numbers in float fields as floats.

    A boolean is not accepted as a number, a number is not accepted as text, and 3.0 is not accepted as a whole number.

    Args:
        hints: the type of each field.
        values: the value of each field that is set; every name must be in ``hints``.
        where: the place of the values in the file, for messages.

    Raises:
        UserError: if a value does not have its field's type.
    """
    read = {}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            advice = "; put it in quotes" if _is_unquoted(value, hints[name]) else ""
            raise UserError(f"{where}.{name} {value!r}: must be {_describe(hints[name])}{advice}")
        read[name] = _convert(value, hints[name])
    return read


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        if get_origin(option) is Literal:
            fits = type(value) is str and value in get_args(option)
        elif get_origin(option) is tuple:
            fits = isinstance(value, list | tuple) and all(_fits(item, get_args(option)[0]) for item in value)
        elif option is float:
            fits = type(value) in (int, float)
        else:
            fits = type(value) is option  # isinstance would accept a bool as an int
        if fits:
            return True
    return False


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if type(value) is int and float in _options(hint) else value


def _is_unquoted(value: Any, hint: Any) -> bool:
    """Return whether text is expected but the value is a number or a boolean, alone or in a list."""
    items = value if isinstance(value, list) else [value]
    return "text" in _describe(hint) and any(type(i) in (bool, int, float) for i in items)


def _describe(hint: Any) -> str:
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(get_args(option)))
        elif get_origin(option) is tuple:
            words.append(f"a list of {_describe(get_args(option)[0])}")
        else:
            words.append(_WORDS[option])
    return " or ".join(words)
