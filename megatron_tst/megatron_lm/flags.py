"""Turns a command line and YAML files into Megatron-LM's arguments.

Megatron-LM's own parser reads the flags. The settings of a YAML file become flags that precede those of the command
line; if a flag is given twice, the later one wins.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args

from megatron_tst.config import RunConfig, SuperpositionSettings, UserError, config_from_mapping, find_named, read_files
from megatron_tst.config.parse import PROGRAM
from megatron_tst.megatron_lm.conflicts import refuse_conflicts
from megatron_tst.megatron_patches import Libraries

# The own trainer's settings without a counterpart here, and the reason to give if the value is not the default.
NOT_TAKEN = {
    "max_nan_steps": "Megatron-LM stops at the first loss or gradient that is not finite",
    "no_verify_checkpoint": "Megatron-LM's checkpoints have no checksums",
}
KERNELS = ("te", "native", "linear")
_PREFLIGHT = ("preflight", "preflight_only", "preflight_timeout", "preflight_min_gb_per_s")


def read_arguments(argv: Sequence[str], libraries: Libraries, has_cuda: bool) -> Namespace:
    """Read a run's settings into Megatron-LM's ``args``; names of this project's own attributes start with ``tst_``.

    Args:
        argv: command-line arguments after the program's name.
        libraries: installed libraries; options that need a missing one are turned off.
        has_cuda: whether there are CUDA devices.

    Raises:
        UserError: if a setting is unknown, refused, malformed or refused by Megatron-LM.
        SystemExit: with code 0 after ``--help``.
    """
    named, others = find_named(argv)
    mapping = read_files(named.config)
    config = config_from_mapping(mapping, source=", ".join(named.config), preset=named.tst_preset)
    is_described = bool(named.config or config.model.tst_preset)
    parser = flag_parser()
    flags = [
        *_platform_flags(libraries, has_cuda),
        *(_flags_of(config, libraries) if is_described else ()),
        *_extra_flags(config.megatron_lm, parser, ", ".join(named.config)),
        *others,
    ]
    # The flags are parsed twice, since Megatron-LM's own function reads a file in place of the command line on request.
    parser.set_defaults(cross_entropy_fusion_impl=None)
    typed = _parse(lambda: parser.parse_args(flags), flags)
    refuse_conflicts(typed)
    args = _parse(lambda: parse_args(_add_flags), flags)
    # The loss is this project's, with the best available kernel unless one is given. Megatron-LM's check would refuse
    # `te` because of its own loss.
    args.tst_loss = typed.cross_entropy_fusion_impl
    args.cross_entropy_loss_fusion, args.cross_entropy_fusion_impl = False, "native"
    args.tst_phases = [dataclasses.asdict(phase) for phase in config.phases]
    args.tst_preset = config.model.tst_preset
    return args


def flag_parser() -> argparse.ArgumentParser:
    """Return a parser of all flags: those of the installed Megatron-LM and those of this project."""
    parser = _add_flags(add_megatron_arguments(argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)))
    for action in parser._actions:
        # Megatron-LM's own --help fails at an unescaped percent sign.
        action.help = re.sub(r"%%|%(?!\()", "%%", action.help or "")
    return parser


def _add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that Megatron-LM does not have, and this project's choices of the loss kernel."""
    parser._option_string_actions["--cross-entropy-fusion-impl"].choices = KERNELS
    group = parser.add_argument_group(title="token superposition")
    hints = get_type_hints(SuperpositionSettings)
    for field in dataclasses.fields(SuperpositionSettings):
        _add_flag(group, field.name, hints[field.name], field.default)
    _add_flag(group, "tst_run_dir", str | None, None)
    _add_flag(group, "keep_last", int | None, None)
    _add_flag(group, "override_run_config", bool, False)
    for name in _PREFLIGHT:
        default = getattr(RunConfig().parallel, name)
        _add_flag(group, name, type(default), default)
    return parser


def _add_flag(group: Any, name: str, hint: Any, default: Any) -> None:
    names = {f"--{name.replace('_', '-')}", f"--{name}"}
    if hint is bool:
        group.add_argument(*sorted(names), action="store_true")
    elif get_origin(hint) is Literal:
        group.add_argument(*sorted(names), choices=get_args(hint), default=default)
    else:
        kind = next(option for option in (get_args(hint) or (hint,)) if option is not type(None))
        group.add_argument(*sorted(names), type=kind, default=default)


def _platform_flags(libraries: Libraries, has_cuda: bool) -> list[str]:
    """Return flags that turn off what is not installed, and that save checkpoints for any layout."""
    flags = ["--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable"]
    if not libraries.gradient_accumulation_fusion:
        flags.append("--no-gradient-accumulation-fusion")
    if libraries.transformer_engine is None:
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"]
        flags += ["--no-rope-fusion"]
    if not has_cuda:
        # torch.compile makes these fusions.
        flags += ["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"]
        flags += ["--distributed-backend", "gloo"]
    return flags


def _flags_of(config: RunConfig, libraries: Libraries) -> list[str]:
    """Return the settings that both trainers have as flags, with the own trainer's values for those not given."""
    flags: list[str] = []
    has_engine = libraries.transformer_engine is not None
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, moe_grouped_gemm=config.model.moe_grouped_gemm and has_engine),
    )
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        if dataclasses.is_dataclass(settings):
            for field in dataclasses.fields(settings):
                flags += _flag(f"{section.name}.{field.name}", getattr(settings, field.name), field.default)
    model = config.model
    if model.max_position_embeddings is None and model.seq_length is not None:
        flags += ["--max-position-embeddings", str(model.seq_length)]
    if model.ffn_hidden_size is None and model.hidden_size is not None:
        flags += ["--ffn-hidden-size", str(4 * model.hidden_size)]
    if model.num_experts is not None:
        flags += ["--moe-router-dtype", "fp32", "--expert-tensor-parallel-size", "1"]
        flags += ["--moe-permute-fusion"] if has_engine else []
    return flags


def _flag(setting: str, value: Any, default: Any) -> list[str]:
    name = setting.rpartition(".")[2]
    if name in NOT_TAKEN:
        if value != default:
            raise UserError(f"{setting} {value}: cannot be used with --tst-trainer megatron-lm: {NOT_TAKEN[name]}")
        return []
    if name in ("tst_preset", "tst_trainer") or value is None or value is False or value == ():
        return []
    return _as_typed(f"--{name.replace('_', '-')}", value)


def _as_typed(flag: str, value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag] if value is True else [flag, str(value)]


def _extra_flags(settings: Mapping[str, Any], parser: argparse.ArgumentParser, source: str) -> list[str]:
    """Return the settings of the section ``megatron_lm`` as flags.

    Raises:
        UserError: if Megatron-LM has no such flag, if it belongs to another section, or if its value is wrong.
    """
    sections = {
        field.name: section.name
        for section in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(value := getattr(RunConfig(), section.name))
        for field in dataclasses.fields(value)
    }
    flags: list[str] = []
    for name, value in settings.items():
        where = f"{source}: megatron_lm.{name}"
        if name in sections:
            raise UserError(f"{where}: belongs in the section {sections[name]}")
        options = parser._option_string_actions
        flag = next((f for f in (f"--{name.replace('_', '-')}", f"--{name}") if f in options), None)
        if flag is None:
            raise UserError(f"{where}: is not a flag of the installed Megatron-LM")
        is_switch = options[flag].nargs == 0
        if is_switch != isinstance(value, bool):
            raise UserError(f"{where} {value!r}: {'must be true or false' if is_switch else 'needs a value'}")
        flags += _as_typed(flag, value) if value is not None and value is not False else []
    return flags


def _parse(parse: Callable[[], Namespace], flags: list[str]) -> Namespace:
    """Call a parser, with the flags in ``sys.argv``, and turn its complaint into a one-line error."""
    complaint = io.StringIO()
    given, sys.argv = sys.argv, [PROGRAM, *flags]
    try:
        with contextlib.redirect_stderr(complaint):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            raise
        message = complaint.getvalue().strip().splitlines()[-1]
        raise UserError(message.partition("error: ")[2] or message) from None
    finally:
        sys.argv = given


def complete(args: Namespace) -> None:
    """Let Megatron-LM check the arguments and fill in those that follow from others.

    Raises:
        UserError: if Megatron-LM refuses them; it quotes the reason.
    """
    try:
        validate_args(args)
    except (AssertionError, ValueError, RuntimeError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"Megatron-LM refuses the settings: {' '.join(str(error).split()) or line}") from error
