"""Whether a value of YAML is of the type that a dataclass declares for it, exactly."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_tst.config.errors import UserError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def read_fields(hints: Mapping[str, Any], values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Return the values as the fields of a dataclass keep them: lists as tuples, whole numbers as floats.

    A truth value is no number, a number is no text, and a number with a point is no whole one.

    Args:
        hints: type of each field.
        values: of fields that there are.
        where: of the values, for messages.

    Raises:
        UserError: if a value is not of its field's type.
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
            fits = type(value) is option  # bool is a kind of int to isinstance
        if fits:
            return True
    return False


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if type(value) is int and float in _options(hint) else value


def _is_unquoted(value: Any, hint: Any) -> bool:
    """Whether a number or truth value stands where text is wanted, alone or in a list."""
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
