"""Turns Megatron-LM's arguments back into a run's settings, which the rest of the package and the run directory use."""

import argparse
import dataclasses
from argparse import Namespace
from typing import Any, cast, get_type_hints

from megatron_tst.config import RunConfig, UserError
from megatron_tst.config.fields import read_fields
from megatron_tst.superposition import Phase

_PLAIN = (bool, int, float, str)


def run_config(args: Namespace, parser: argparse.ArgumentParser, vocab_size: int | None = None) -> RunConfig:
    """Return the settings that correspond to arguments; those that only Megatron-LM has keep its names.

    Args:
        args: Megatron-LM's arguments, checked and completed.
        parser: parser of all flags.
        vocab_size: number of tokens of the vocabulary, without padding; None if unknown.
    """
    config = RunConfig()
    known: set[str] = set()
    for section in dataclasses.fields(config):
        settings: Any = getattr(config, section.name)
        if dataclasses.is_dataclass(settings):
            values = _values(settings, args, parser)
            known |= {f"--{name.replace('_', '-')}" for name in values}
            changed: dict[str, Any] = {section.name: dataclasses.replace(cast(Any, settings), **values)}
            config = dataclasses.replace(config, **changed)
    model = dataclasses.replace(config.model, vocab_size=vocab_size or config.model.vocab_size, tst_preset=None)
    return dataclasses.replace(
        config,
        model=model,
        training=dataclasses.replace(config.training, tst_trainer="megatron-lm"),
        phases=tuple(Phase(**phase) for phase in args.tst_phases),
        megatron_lm=_others(args, parser, known),
    )


def _values(settings: Any, args: Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the fields of a section for which the arguments have a value that the own trainer accepts, too."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(type(settings)).items():
        action = parser._option_string_actions.get(f"--{name.replace('_', '-')}")
        if action is None or not hasattr(args, action.dest):
            continue
        value = getattr(args, action.dest)
        value = not value if action.const is False else value
        try:
            values |= read_fields({name: hint}, {name: value}, "")
        except UserError:  # only Megatron-LM accepts this value, or the value was not given
            continue
    return values


def _others(args: Namespace, parser: argparse.ArgumentParser, known: set[str]) -> dict[str, Any]:
    """Return the flags that only Megatron-LM has and whose given value is not the default."""
    given: dict[str, Any] = {}
    for action in parser._actions:
        flag = action.option_strings[0]
        if known & set(action.option_strings) or action.dest not in args.tst_given:
            continue
        value = args.tst_given[action.dest]
        given[flag.lstrip("-").replace("-", "_")] = True if action.nargs == 0 else value
    return given


def given_values(args: Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the plain arguments, as they were parsed, that differ from their defaults, by name."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        items = value if isinstance(value, list) else [value]
        if value != action.default and all(type(item) in _PLAIN for item in items):
            found[action.dest] = value
    return found
