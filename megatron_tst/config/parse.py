"""From a YAML file and a command line to a :class:`RunConfig`.

Defaults < preset < YAML < flags.
"""

import argparse
import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typeguard
import tyro
import yaml

from megatron_tst.config.errors import UserError
from megatron_tst.config.refused import refusal
from megatron_tst.config.rules import check_config
from megatron_tst.config.settings import RunConfig
from megatron_tst.config.shapes import PRESETS
from megatron_tst.superposition import Phase

PROGRAM = "pretrain_tst.py"
_Settings = TypeVar("_Settings")


def parse_config(argv: Sequence[str]) -> RunConfig:
    """Read a run's settings from the command line, and from the YAML file it names with ``--config``.

    Args:
        argv: the arguments after the program's name.

    Raises:
        UserError: for an unknown, refused, malformed or contradictory setting.
        SystemExit: with code 0 after ``--help``.
    """
    config = read_config(argv)
    check_config(config)
    return config


def read_config(argv: Sequence[str]) -> RunConfig:
    """Read settings as :func:`parse_config` does, without asking whether they make a run.

    Raises:
        UserError: for an unknown, refused or malformed setting.
        SystemExit: with code 0 after ``--help``.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", nargs="?")
    first.add_argument("--tst-preset", "--tst_preset", nargs="?")
    named, _ = first.parse_known_args(argv)
    mapping = _read_yaml(Path(named.config)) if named.config else {}
    config = config_from_mapping(mapping, source=named.config or "", preset=named.tst_preset)
    return _apply_flags(config, argv)


def config_from_mapping(mapping: Mapping[str, Any], source: str, preset: str | None = None) -> RunConfig:
    """Build settings from the sections of a YAML file, over the defaults and the preset they name.

    Args:
        mapping: section name to settings; ``phases`` is a list of ``{bag_size, steps}``, and ``reads_bags: false``
            where single tokens predict bags.
        source: the file's name, for messages.
        preset: a preset that replaces the one named in the mapping.

    Raises:
        UserError: if a section, setting, type or preset is not known.
    """
    config = RunConfig()
    sections = {f.name for f in dataclasses.fields(RunConfig)} - {"config"}
    for section in mapping:
        if section not in sections:
            raise UserError(f"{source}: {section!r} is not a section; the sections are {', '.join(sorted(sections))}")
    preset = preset or (mapping.get("model") or {}).get("tst_preset")
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--tst-preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    model = {**PRESETS.get(preset or "", {}), **(mapping.get("model") or {}), "tst_preset": preset}
    for section, values in {**mapping, "model": model}.items():
        if section == "phases":
            config = dataclasses.replace(config, phases=_read_phases(values, source))
        else:
            overlaid = _overlay(getattr(config, section), values or {}, f"{source}: {section}")
            config = dataclasses.replace(config, **{section: overlaid})
    return config


def load_config(path: Path) -> RunConfig:
    """Read settings that :func:`dump_config` wrote.

    Raises:
        UserError: if the file cannot be read or is not settings.
    """
    return config_from_mapping(_read_yaml(path), source=str(path))


def dump_config(config: RunConfig) -> str:
    """Write settings as YAML that :func:`parse_config` reads back to the same settings."""
    mapping = dataclasses.asdict(config)
    del mapping["config"]
    mapping["phases"] = [
        {"bag_size": phase.bag_size, "steps": phase.num_steps, "reads_bags": phase.reads_bags}
        for phase in config.phases
    ]
    return yaml.safe_dump(_tuples_to_lists(mapping), sort_keys=False)


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as a string; here it is the number that its writer meant."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # A loader of SafeLoader's kind: it builds numbers, strings, lists and mappings, never objects.
        mapping = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise UserError(f"--config {path}: must hold sections, such as 'model:'")
    return mapping


def _read_phases(values: Any, source: str) -> tuple[Phase, ...]:
    try:
        return tuple(Phase(entry["bag_size"], entry["steps"], entry.get("reads_bags", True)) for entry in values or ())
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source}: phases must be a list of {{bag_size, steps}}, each at least 1: {error}") from error


def _overlay(settings: _Settings, values: Mapping[str, Any], where: str) -> _Settings:
    hints = get_type_hints(type(settings))
    checked = {}
    for name, value in values.items():
        if name not in hints:
            instead = refusal(name)
            raise UserError(f"{where}.{name}: " + (f"is not taken: {instead}" if instead else "is not a setting"))
        value = tuple(value) if isinstance(value, list) else value
        try:
            checked[name] = typeguard.check_type(value, hints[name])
        except typeguard.TypeCheckError as error:
            raise UserError(f"{where}.{name} {value!r}: {error}") from error
    return dataclasses.replace(settings, **checked)  # type: ignore[type-var]


def _apply_flags(config: RunConfig, argv: Sequence[str]) -> RunConfig:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                RunConfig,
                prog=PROGRAM,
                description="Pre-train a GPT; with --tst-bag-size, by Token Superposition Training.",
                default=config,
                args=list(argv),
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    if unknown:
        instead = refusal(unknown[0])
        value = " ".join(unknown[:2]) if len(unknown) > 1 and not unknown[1].startswith("--") else unknown[0]
        raise UserError(f"{value}: " + (f"is not taken: {instead}" if instead else f"unknown; see {PROGRAM} --help"))
    assert isinstance(parsed, RunConfig)
    return parsed


def _one_line(panel: str) -> str:
    """Draw the message out of tyro's panel: its lines up to the first rule or blank one."""
    message: list[str] = []
    for line in panel.splitlines()[1:]:
        text = line.strip("│ ").strip()
        if not text or text.startswith("─"):
            break
        message.append(text)
    return " ".join(message)
