import dataclasses

import pytest

from megatron_tst.config import RunConfig
from megatron_tst.config.effects import METHOD, MODEL, NOTHING, ROUTING, RUN, TEXT, TUNING, effect_of

SETTINGS = [
    f"{section.name}.{setting.name}"
    for section in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(section.type)
    for setting in dataclasses.fields(section.type)
]


@pytest.mark.parametrize("name", [*SETTINGS, "config", "phases"])
def test_every_setting_has_an_effect(name):
    effect = effect_of(RunConfig, name)
    # A setting that alters the function or stops a run is also reported.
    assert effect.is_reported or not (effect.is_binding or effect.alters_function)


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("model.hidden_size", MODEL), ("model.seq_length", METHOD), ("model.moe_expert_capacity_factor", ROUTING),
        ("superposition.tst_bag_size", METHOD), ("training.seed", RUN), ("optimizer.lr", TUNING),
        ("data.data_path", TEXT), ("parallel.context_parallel_size", NOTHING), ("logging.log_interval", NOTHING),
    ],
)  # fmt: skip
def test_field_has_its_own_effect_or_that_of_its_section(name, effect):
    assert effect_of(RunConfig, name) == effect


def test_unknown_setting_has_no_effect():
    with pytest.raises(StopIteration):
        effect_of(RunConfig, "nothing.of_that_name")
