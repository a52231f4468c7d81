"""Every setting at its edges, generated from the settings themselves."""

import dataclasses
import math
from typing import get_type_hints

import pytest

from megatron_tst.config import RunConfig, UserError, parse_config
from megatron_tst.config.ranges import RANGES, range_rules

SETTINGS = {
    f"{section.name}.{setting.name}": get_type_hints(section.type)[setting.name]
    for section in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(section.type)
    for setting in dataclasses.fields(section.type)
}
NUMBERS = {name for name, hint in SETTINGS.items() if any(part in str(hint) for part in ("int", "float"))}
NUMBERS -= {name for name in NUMBERS if "Literal" in str(SETTINGS[name])}
WHOLE = "--config examples/quickstart/config.yaml".split()


def refused(config: RunConfig) -> list[str]:
    return [f"{flag}: {rule}" for holds, flag, rule in range_rules(config) if not holds]


def with_value(name: str, value) -> RunConfig:
    section, _, setting = name.partition(".")
    config = RunConfig()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{setting: value})})


def test_every_number_has_a_range():
    assert RANGES.keys() == NUMBERS


def test_the_defaults_are_allowed():
    assert refused(RunConfig()) == []


@pytest.mark.parametrize("name", sorted(NUMBERS))
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, 10**30])
def test_negative_infinite_and_absurd_numbers_are_refused(name, value):
    (line,) = refused(with_value(name, value))
    assert line.startswith(f"--{name.partition('.')[2].replace('_', '-')} {value}: must ")


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("training.seed", 2**32 - 1, 2**32), ("optimizer.adam_beta1", 0.0, 1.0), ("optimizer.adam_beta2", 0.999, 1.5),
        ("model.attention_dropout", 0.99, 1.0), ("model.rotary_percent", 1.0, 1.01), ("optimizer.clip_grad", 0.0, -0.1),
        ("optimizer.lr_decay_iters", 1, 0), ("parallel.distributed_timeout_minutes", 1, 0), ("model.kv_channels", 1, 0),
        ("model.make_vocab_size_divisible_by", 1, 0), ("data.num_workers", 0, -1), ("optimizer.lr", 1e-9, 0.0),
    ],
)  # fmt: skip
def test_a_range_ends_where_it_says(name, inside, outside):
    assert refused(with_value(name, inside)) == []
    assert len(refused(with_value(name, outside))) == 1


@pytest.mark.parametrize("name", sorted(name for name, hint in SETTINGS.items() if hint in (str, str | None)))
def test_empty_text_is_refused(name):
    assert refused(with_value(name, "")) and refused(with_value(name, " "))


@pytest.mark.parametrize("name", ["data_path", "train_data_path", "valid_data_path"])
def test_an_empty_path_in_a_list_is_refused(name):
    assert refused(with_value(f"data.{name}", ("1", "")))


@pytest.mark.parametrize(
    "flags",
    [
        "--seed -1", "--seed 4294967296", "--adam-beta1 1", "--adam-beta2 1.5", "--weight-decay -5",
        "--attention-dropout 1.5", "--init-method-std -1", "--ffn-hidden-size 0", "--kv-channels 0", "--clip-grad nan",
        "--make-vocab-size-divisible-by 0", "--lr inf", "--distributed-timeout-minutes 0",
    ],
)  # fmt: skip
def test_a_start_refuses_a_value_by_its_flag(flags):
    with pytest.raises(UserError) as error:
        parse_config([*WHOLE, *flags.split()])
    assert str(error.value).splitlines()[0].startswith(flags.split()[0])


@pytest.mark.parametrize("flag", ["--tst-run-dir", "--tokenizer-model", "--tensorboard-dir", "--load", "--save"])
def test_a_start_refuses_empty_text(flag):
    with pytest.raises(UserError, match=f"{flag} '': must not be empty"):
        parse_config([*WHOLE, flag, ""])
