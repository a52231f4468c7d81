"""Read a :class:`RunConfig` from a YAML file and a command line.

Flags override YAML, YAML overrides the preset, and the preset overrides the defaults.
"""

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from megatron_tst.config.errors import UserError
from megatron_tst.config.fields import read_fields
from megatron_tst.config.presets import PRESETS
from megatron_tst.config.rules import check_config
from megatron_tst.config.settings import TRAINERS, ModelSettings, RunConfig
from megatron_tst.config.unsupported_flags import refusal
from megatron_tst.config.yaml_files import parse_yaml, read_yaml, write_yaml
from megatron_tst.superposition import Phase

PROGRAM = "pretrain_tst.py"
_Settings = TypeVar("_Settings")


def parse_config(argv: Sequence[str]) -> RunConfig:
    """Read a run's settings from the command line and from the YAML file that its ``--config`` names.

    Args:
        argv: command-line arguments, without the program's name.

    Raises:
        UserError: if a setting is unknown, unsupported, malformed or contradicts another.
        SystemExit: with code 0 after ``--help``.
    """
    config = read_config(argv)
    if config.megatron_lm:
        raise UserError(
            f"megatron_lm: {', '.join(config.megatron_lm)}: only Megatron-LM's trainer has these settings; use "
            "--tst-trainer megatron-lm"
        )
    check_config(config)
    return config


def read_config(argv: Sequence[str]) -> RunConfig:
    """Read settings as :func:`parse_config` does, without checking that they form a valid run.

    Raises:
        UserError: if a setting is unknown, unsupported or malformed.
        SystemExit: with code 0 after ``--help``.
    """
    named, _ = find_named(argv)
    config = config_from_mapping(read_files(named.config), source=", ".join(named.config), preset=named.tst_preset)
    return _apply_flags(config, argv)


def find_named(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Find what decides how the rest of a command line is read.

    Returns:
        ``config``, the YAML files in order, ``tst_preset`` and ``tst_trainer``, both None where not given; and the
        other arguments.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", nargs="?", action="append", default=[])
    first.add_argument("--tst-preset", "--tst_preset", nargs="?")
    first.add_argument("--tst-trainer", "--tst_trainer", nargs="?")
    named, others = first.parse_known_args(argv)
    named.config = [file for file in named.config if file]
    return named, others


def find_trainer(argv: Sequence[str]) -> str:
    """Return the trainer that a command line, or else a YAML file that it names, chooses.

    Raises:
        UserError: if there is none of this name, or a file cannot be read.
    """
    named, _ = find_named(argv)
    section = read_files(named.config).get("training") or {}
    trainer = named.tst_trainer or section.get("tst_trainer") or TRAINERS[0]
    if trainer not in TRAINERS:
        raise UserError(f"--tst-trainer {trainer}: unknown; choose from {', '.join(TRAINERS)}")
    return str(trainer)


def read_files(files: Sequence[str]) -> dict[str, Any]:
    """Read YAML files, of which the later wins, setting by setting; a list of phases is one setting.

    Raises:
        UserError: if a file cannot be read, or one of its sections, settings or types is not known.
    """
    merged: dict[str, Any] = {}
    for file in files:
        mapping = read_yaml(Path(file))
        config_from_mapping(mapping, source=file)
        for section, values in mapping.items():
            if isinstance(values, dict):
                values = {**merged.get(section, {}), **values}
            if values is not None:  # an empty section says nothing
                merged[section] = values
    return merged


def config_from_mapping(mapping: Mapping[str, Any], source: str, preset: str | None = None) -> RunConfig:
    """Build settings from the sections of a YAML file, on top of the defaults and of the preset that they name.

    Args:
        mapping: settings by section; ``phases`` is a list of ``{bag_size, steps}``, with ``reads_bags: false`` in
            phases whose single tokens predict bags.
        source: the file's name, for messages.
        preset: a preset that replaces the one named in the mapping.

    Raises:
        UserError: if a section, a setting or a preset is unknown, or a value has the wrong type.
    """
    config = RunConfig()
    sections = {f.name for f in dataclasses.fields(RunConfig)} - {"config"}
    for section in mapping:
        if section not in sections:
            raise UserError(f"{source}: {section!r} is not a section; the sections are {', '.join(sorted(sections))}")
    for section, values in mapping.items():
        read: Any
        if section == "phases":
            read = _read_phases(values, source)
        elif section == "megatron_lm":
            read = _read_flags(values, f"{source}: {section}")
        else:
            read = _read_section(getattr(config, section), values, f"{source}: {section}")
        config = dataclasses.replace(config, **{section: read})
    preset = preset or config.model.tst_preset
    if preset is None:
        return config
    if preset not in PRESETS:
        raise UserError(f"--tst-preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    model = {**PRESETS[preset], **(mapping.get("model") or {}), "tst_preset": preset}
    return dataclasses.replace(config, model=_read_section(ModelSettings(), model, f"{source}: model"))


def load_config(path: Path) -> RunConfig:
    """Read settings that :func:`dump_config` wrote.

    Raises:
        UserError: if the file cannot be read or does not hold settings.
    """
    return config_from_mapping(read_yaml(path), source=str(path))


def load_config_text(text: str, source: str) -> RunConfig:
    """Read settings that :func:`dump_config` wrote, from their text.

    Args:
        text: the YAML.
        source: where it is from, for messages.

    Raises:
        UserError: if it is not settings.
    """
    return config_from_mapping(parse_yaml(text, source), source)


def dump_config(config: RunConfig) -> str:
    """Return settings as YAML from which :func:`parse_config` reads the same settings."""
    mapping = dataclasses.asdict(config)
    del mapping["config"]
    mapping["phases"] = [
        {"bag_size": phase.bag_size, "steps": phase.num_steps, "reads_bags": phase.reads_bags}
        for phase in config.phases
    ]
    return write_yaml(_tuples_to_lists(mapping))


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read_section(settings: _Settings, values: Any, where: str) -> _Settings:
    """Override the settings of a section with the given values; a section may be empty."""
    if values is None:
        return settings
    if not isinstance(values, dict):
        raise UserError(f"{where} {values!r}: must be a mapping of settings")
    hints = get_type_hints(type(settings))
    for name in values:
        if name not in hints:
            instead = refusal(str(name))
            raise UserError(f"{where}.{name}: " + (f"is not supported: {instead}" if instead else "is not a setting"))
    return dataclasses.replace(settings, **read_fields(hints, values, where))  # type: ignore[type-var]


def _read_flags(values: Any, where: str) -> dict[str, Any]:
    """Read settings that Megatron-LM alone has: what they mean is for its own parser to say."""
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{where} {values!r}: must be a mapping of settings")
    read = {}
    for name, value in (values or {}).items():
        items = value if isinstance(value, list) else [value]
        if not all(item is None or type(item) in (bool, int, float, str) for item in items):
            raise UserError(f"{where}.{name} {value!r}: must be a number, text, true, false or a list of them")
        read[str(name)] = tuple(value) if isinstance(value, list) else value
    return read


def _read_phases(values: Any, source: str) -> tuple[Phase, ...]:
    if not isinstance(values, list) and values is not None:
        raise UserError(f"{source}: phases {values!r}: must be a list of {{bag_size, steps}}")
    return tuple(_read_phase(entry, f"{source}: phases[{index}]") for index, entry in enumerate(values or ()))


def _read_phase(entry: Any, where: str) -> Phase:
    """Read ``{bag_size, steps}`` with an optional ``reads_bags``."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} {entry!r}: must be {{bag_size, steps}}")
    hints = get_type_hints(Phase)
    hints["steps"] = hints.pop("num_steps")
    for name in entry:
        if name not in hints:
            raise UserError(f"{where}.{name}: is not a setting of a phase; its settings are {', '.join(hints)}")
    for name in ("bag_size", "steps"):
        if name not in entry:
            raise UserError(f"{where}: must have {name}")
    read = read_fields(hints, entry, where)
    try:
        return Phase(read.pop("bag_size"), read.pop("steps"), **read)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _apply_flags(config: RunConfig, argv: Sequence[str]) -> RunConfig:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                RunConfig,
                prog=PROGRAM,
                description="Pre-train a GPT; with --tst-bag-size above 1, by Token Superposition Training.",
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
        reason = f"is not supported: {instead}" if instead else f"unknown; see {PROGRAM} --help"
        raise UserError(f"{value}: {reason}")
    assert isinstance(parsed, RunConfig)
    return parsed


def _one_line(panel: str) -> str:
    """Return the message in tyro's panel: its lines up to the first ruled or blank one."""
    message: list[str] = []
    for line in panel.splitlines()[1:]:
        text = line.strip("│ ").strip()
        if not text or text.startswith("─"):
            break
        message.append(text)
    return " ".join(message)
