"""The paper's tables, compared with this project's own arithmetic."""

import math

import pytest

from megatron_tst.config import PRESETS, ModelSettings
from megatron_tst.planning.published import (
    MODELS,
    advise,
    flops_per_position,
    grids,
    implied_mfu,
    published_runs,
)
from megatron_tst.shape import resolve_shape
from megatron_tst.shape.parameters import count_parameters
from megatron_tst.superposition import Schedule

RUNS = [run for run in published_runs() if run.method != "tst_reinitialised"]
IDS = [f"{run.model} {run.method} {run.total_steps}" for run in RUNS]


def printed(number: float, like: float) -> set[float]:
    """Return a number as the paper would print it with the same digits: rounded or truncated."""
    digits = len(f"{like:.15g}".rstrip("0").replace(".", "").rstrip("0")) or 1
    unit = 10 ** (math.floor(math.log10(like)) - digits + 1)
    return {round(number / unit) * unit, math.floor(number / unit) * unit}


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_token_counts_match_table_1(run):
    schedule = Schedule.superposed(run.bag_size, run.superposition_steps / run.total_steps, run.total_steps)
    total = schedule.data_tokens(run.total_steps, run.positions_per_step)
    superposed = schedule.data_tokens(run.superposition_steps, run.positions_per_step)
    assert any(math.isclose(run.total_data_tokens, text) for text in printed(total, run.total_data_tokens))
    if run.superposition_steps:
        text = printed(superposed, run.superposition_data_tokens)
        assert any(math.isclose(run.superposition_data_tokens, tokens) for tokens in text)


def test_a_batch_of_two_million_in_powers_of_ten_does_not_match():
    assert not any(math.isclose(42e9, text) for text in printed(20000 * 2e6, 42e9))


def test_the_moe_models_hours_are_proportional_to_its_steps():
    baseline, tst = (run for run in RUNS if run.model == "10B-A1B MoE")
    assert baseline.total_steps / tst.total_steps == pytest.approx(baseline.gpu_hours / tst.gpu_hours, rel=0.05)
    hours = tst.total_steps * tst.positions_per_step / baseline.positions_per_s / 3600
    assert hours == pytest.approx(tst.gpu_hours, rel=0.10)
    assert tst.superposition_steps * tst.positions_per_step / baseline.positions_per_s / 3600 < 0.5 * tst.gpu_hours


@pytest.mark.parametrize("name", MODELS)
def test_flops_per_position_are_six_per_matrix_parameter_plus_attention(name):
    model = ModelSettings(**PRESETS[MODELS[name][0]])
    multiplied = count_parameters(resolve_shape(model), active=True) - model.vocab_size * model.hidden_size
    width = (model.kv_channels or model.hidden_size // model.num_attention_heads) * model.num_attention_heads
    attention = 6 * model.num_layers * (model.seq_length + 1) * width
    assert flops_per_position(model) == pytest.approx(6 * multiplied + attention, rel=0.001)


def test_a_published_model_has_its_own_mfu():
    for name, (preset, _) in MODELS.items():
        share, found = implied_mfu(ModelSettings(**PRESETS[preset]))
        assert found == name
        assert 0.05 < share < 0.6


def test_the_most_similar_model_is_of_the_same_kind():
    experts = {**PRESETS["10b-a1b"], "num_layers": 4}
    dense = {**PRESETS["3b"], "num_layers": 72}
    assert implied_mfu(ModelSettings(**experts))[1] == "10B-A1B MoE"
    assert implied_mfu(ModelSettings(**dense))[1] == "3B dense"


def test_grids_contain_the_papers_points():
    first = grids()[0]
    assert first.baseline == 3.2124
    assert len(first.points) == 135
    assert min(first.points, key=lambda point: point.final_loss).bag_size == 7


@pytest.mark.parametrize(
    ("preset", "steps", "first"),
    [("270m", 20000, (7, 0.3)), ("270m", 100000, (5, 0.3)), ("600m", 20000, (8, 0.2))],
)
def test_the_best_point_of_the_models_own_grid_is_suggested(preset, steps, first):
    best, *_ = advise(ModelSettings(**PRESETS[preset]), steps)
    assert (best.bag_size, best.step_ratio) == first


def test_a_setting_with_less_data_within_noise_is_suggested():
    best, frugal = advise(ModelSettings(**PRESETS["270m"]), 20000)
    assert frugal.data_ratio < best.data_ratio
    assert best.gain - 0.002 <= frugal.gain <= best.gain
    assert best.data_ratio == pytest.approx(0.3 * 7 + 0.7)


def test_a_larger_model_gets_the_setting_of_the_papers_run():
    *_, own = advise(ModelSettings(**PRESETS["10b-a1b"]), 49983)
    assert (own.bag_size, own.step_ratio) == (16, 0.25)
    assert own.gain == pytest.approx(2.252 - 2.236)
    *_, own = advise(ModelSettings(**PRESETS["3b"]), 20000)
    assert (own.bag_size, own.step_ratio, own.gain) == (6, 0.3, pytest.approx(2.808 - 2.676))


def test_the_best_for_limited_data_is_labeled_as_such():
    model = ModelSettings(**PRESETS["270m"])
    free, scarce = advise(model, 20000)[0], advise(model, 20000, max_data_ratio=1.5)[0]
    assert free.source.startswith("best of the grid 270m")
    assert scarce.source.startswith("best for the available data of the grid 270m")
    assert scarce.gain < free.gain


def test_advice_stays_within_the_data():
    model = ModelSettings(**PRESETS["600m"])
    assert all(advice.data_ratio <= 1.5 for advice in advise(model, 20000, max_data_ratio=1.5))
    assert advise(model, 20000, max_data_ratio=1.01) == []
