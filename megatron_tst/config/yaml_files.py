"""YAML that means what it looks like: the plain values of YAML 1.2, no key twice, nothing executed."""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_tst.config.errors import UserError

# Which plain words are not text. YAML 1.1, PyYAML's own reading, takes `010` for 8, `yes` for true, `1:30` for 90 and
# `3e-4` for text; here the first three stay text, which no number or truth value is, and the last is a number.
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
    """Builds numbers, text, lists and mappings, never objects; refuses a key that is there twice."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, whose keys must differ."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: a key must be a word")
            if key in lines:
                message = f"{key!r} is there twice, on lines {lines[key]} and {line}"
                raise yaml.constructor.ConstructorError(None, None, message)
            lines[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that the loader would take for something else."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


for _kind, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a mapping.

    Anchors and aliases repeat a value; merge keys (``<<``) are keys like any other.

    Raises:
        UserError: if the file cannot be read, is not YAML, holds a key twice or anything but a mapping.
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
    """Return YAML that :func:`read_yaml` reads back the same."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False)
