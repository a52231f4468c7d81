"""Strict YAML: the plain values of YAML 1.2, no duplicate keys, and nothing is executed."""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_tst.config.errors import UserError

# The unquoted words that are not text. YAML 1.1, which PyYAML implements, reads `010` as 8, `yes` as true, `1:30` as 90
# and `3e-4` as text. Here the first three are text, which no numeric or boolean field accepts, and the last a number.
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9]\d*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.\d+|(0|[1-9]\d*)\.\d*)([eE][-+]?\d+)?|[-+]?(0|[1-9]\d*)[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """Builds numbers, text, lists and mappings, never objects; rejects duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping and reject duplicate keys."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: a key must be a word")
            if key in lines:
                message = f"{key!r} appears twice, on lines {lines[key]} and {line}"
                raise yaml.constructor.ConstructorError(None, None, message)
            lines[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would not read as text."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


for _kind, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a file that holds one mapping.

    Anchors and aliases repeat a value; merge keys (``<<``) have no special meaning.

    Raises:
        UserError: if the file cannot be read, is not YAML, has a duplicate key or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> dict[Any, Any]:
    """Read a mapping as :func:`read_yaml` does.

    Args:
        text: the YAML.
        path: where it is from, for messages.
    """
    try:
        mapping = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"--config {path}: {_line(error)}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise UserError(f"--config {path}: must hold sections, such as 'model:'")
    return mapping


def _line(error: yaml.constructor.ConstructorError) -> str:
    return f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""


def write_yaml(mapping: dict[str, Any]) -> str:
    """Return YAML from which :func:`read_yaml` reads an equal mapping."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False)
