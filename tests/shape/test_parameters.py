import pytest

from megatron_tst.config import PRESETS, ModelSettings
from megatron_tst.shape import resolve_shape
from megatron_tst.shape.parameters import checkpoint_bytes, count_parameters
from tests.model.small import DENSE, GPT2, MOE, VOCAB, small_model
from tests.model.test_shapes import PARAMETERS


@pytest.mark.parametrize("shape", [DENSE, MOE, GPT2], ids=["dense", "moe", "gpt2"])
def test_formula_equals_the_count_of_the_built_model(rank, shape):
    built = sum(parameter.numel() for parameter in small_model(shape).parameters())
    assert count_parameters(resolve_shape(ModelSettings(**shape), VOCAB)) == built
    assert count_parameters(resolve_shape(ModelSettings(**shape), VOCAB + 1)) != built


@pytest.mark.parametrize("name", PRESETS)
def test_published_shapes_have_their_published_counts(name):
    model = ModelSettings(**PRESETS[name])
    assert count_parameters(resolve_shape(model)) == PARAMETERS[name]


def test_position_of_the_moe_model_uses_a_billion_parameters_and_the_tables():
    model = ModelSettings(**PRESETS["10b-a1b"])
    tables = 2 * model.vocab_size * model.hidden_size
    assert round((count_parameters(resolve_shape(model), active=True) - tables) / 1e9, 1) == 1.0


def test_checkpoint_size_counts_weights_and_optimizer_state():
    assert (checkpoint_bytes(10, bf16=True), checkpoint_bytes(10, bf16=False)) == (140, 160)
