"""The settings that a run may change when it resumes from a checkpoint."""

from dataclasses import replace

import pytest

from megatron_tst.checkpoint.changes import find_changes
from megatron_tst.config import (
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunConfig,
    SuperpositionSettings,
    TrainingSettings,
)

MODEL = ModelSettings(
    num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, position_embedding_type="rope"
)
SAVED = RunConfig(model=MODEL, training=TrainingSettings(train_iters=10), optimizer=OptimizerSettings(lr=1e-3))


def test_equal_settings_have_no_changes():
    assert find_changes(SAVED, SAVED) == []


@pytest.mark.parametrize(
    "wanted",
    [
        replace(SAVED, training=replace(SAVED.training, train_iters=20, eval_interval=7, micro_batch_size=3)),
        replace(SAVED, parallel=ParallelSettings(tensor_model_parallel_size=4)),
    ],
)
def test_settings_that_may_change_freely_are_not_changes(wanted):
    assert find_changes(SAVED, wanted) == []


def test_change_of_the_method_is_binding():
    wanted = replace(SAVED, superposition=SuperpositionSettings(tst_bag_size=8))
    (change,) = find_changes(SAVED, wanted)
    assert change.is_binding
    assert str(change) == "--tst-bag-size 8: the checkpoint was made with 1"


def test_change_of_the_learning_rate_is_reported_but_not_binding():
    (change,) = find_changes(SAVED, replace(SAVED, optimizer=OptimizerSettings(lr=2e-3)))
    assert not change.is_binding
    assert change.flag == "--lr"


EXPERTS = replace(MODEL, num_experts=4, moe_ffn_hidden_size=24)


def model_changes(saved: ModelSettings, **wanted) -> list[str]:
    changes = find_changes(replace(SAVED, model=saved), replace(SAVED, model=replace(saved, **wanted)))
    return [change.name.removeprefix("model.") for change in changes if change.alters_model]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (MODEL, {"rotary_base": 5000}),
        (MODEL, {"rotary_percent": 0.5}),
        (MODEL, {"position_embedding_type": "none"}),
        (MODEL, {"norm_epsilon": 1e-6}),
        (MODEL, {"normalization": "RMSNorm"}),
        (MODEL, {"disable_bias_linear": True}),
        (MODEL, {"untie_embeddings_and_output_weights": True}),
        # The same weights are divided into other heads.
        (MODEL, {"num_attention_heads": 2, "kv_channels": 16}),
        (EXPERTS, {"moe_router_topk": 1}),
        (EXPERTS, {"moe_expert_capacity_factor": 0.5}),
        (replace(MODEL, position_embedding_type="learned_absolute"), {"max_position_embeddings": 32}),
    ],
)
def test_changes_of_the_models_function_are_found(model, wanted):
    assert set(wanted) <= set(model_changes(model, **wanted))


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        # An import writes these settings out, and a command line leaves them at their defaults.
        (MODEL, {"kv_channels": 8, "ffn_hidden_size": 128, "num_query_groups": 4, "max_position_embeddings": 16}),
        (MODEL, {"group_query_attention": True, "num_query_groups": 4}),
        (MODEL, {"moe_router_topk": 8, "moe_token_drop_policy": "position"}),
        (MODEL, {"hidden_dropout": 0.3, "attention_dropout": 0.3, "init_method_std": 0.1, "seq_length": 8}),
        (EXPERTS, {"ffn_hidden_size": 7, "moe_aux_loss_coeff": 0.1, "moe_grouped_gemm": True}),
        (replace(MODEL, position_embedding_type="none"), {"rotary_base": 5000}),
    ],
)
def test_other_notations_of_the_same_model_are_not_changes(model, wanted):
    assert model_changes(model, **wanted) == []
