"""config.json and our settings: each side's output is read by the other side's reader."""

import dataclasses
import json
import math

import pytest

from megatron_tst.config import PRESETS, ModelSettings, UserError
from megatron_tst.conversion.settings import (
    ARCHITECTURES,
    SHARED_ABSENT,
    architecture_of,
    config_json,
    inexpressible,
    read_config_json,
)
from megatron_tst.conversion.tokenizer_files import TokenIds
from tests.checkpoint.saved import MODELS

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

# As published with Qwen/Qwen3-30B-A3B, by transformers 4.51.
QWEN3_MOE = json.loads(
    """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
    "vocab_size": 151936}"""
)
# As published with the first Llama-2 files.
LLAMA2 = json.loads(
    """{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "tie_word_embeddings": false, "torch_dtype": "float16", "vocab_size": 32000}"""
)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_a_round_trip(preset):
    model = ModelSettings(**PRESETS[preset])
    contents = json.loads(json.dumps(config_json(model, 128, TokenIds(eos=7), "bfloat16")))
    architecture, back, _ = read_config_json(contents, "config.json")
    assert architecture is architecture_of(model)
    same = (*PRESETS[preset].keys() - {"vocab_size", "seq_length", "kv_channels"},)
    for setting in set(same) - {"moe_token_dispatcher_type", "moe_grouped_gemm"}:  # implementation only
        assert getattr(back, setting) == getattr(model, setting), setting
    assert (back.vocab_size, back.max_position_embeddings) == (128, model.seq_length)
    assert back.kv_channels == (model.kv_channels or model.hidden_size // model.num_attention_heads)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_intended_values(name, tmp_path):
    model = ModelSettings(**{**MODELS[name], "attention_dropout": 0.25, "init_method_std": 0.03})
    contents = config_json(model, 301, TokenIds(eos=7), "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(contents))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert contents["architectures"] == [type(transformers.AutoModelForCausalLM.from_config(config)).__name__]
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
    assert rope["rope_theta"] == 5000.0
    assert (config.rms_norm_eps, config.attention_dropout, config.initializer_range) == (1e-3, 0.25, 0.03)
    assert config.head_dim == (model.kv_channels or 8)
    assert config.num_key_value_heads == (2 if model.group_query_attention else 4)
    assert config.tie_word_embeddings == (name == "llama-tied")
    assert (config.eos_token_id, config.bos_token_id, config.max_position_embeddings) == (7, None, 16)
    if model.num_experts:
        assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 24)
        assert (config.router_aux_loss_coef, config.norm_topk_prob) == (0.01, True)


def test_published_files_are_read():
    _, moe, _ = read_config_json(QWEN3_MOE, "config.json")
    assert (moe.num_experts, moe.moe_router_topk, moe.rotary_base, moe.kv_channels) == (128, 8, 1000000, 128)
    assert moe.qk_layernorm and moe.untie_embeddings_and_output_weights
    _, llama, _ = read_config_json(LLAMA2, "config.json")
    assert (llama.kv_channels, llama.group_query_attention, llama.rotary_base) == (128, False, 10000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba': unknown architecture; known are llama, qwen3, qwen3_moe"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        ({"norm_topk_prob": None}, "norm_topk_prob None"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope of type 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "rope of type 'default' over 0.5 of a head"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types .* only 'full_attention'"),
        ({"layer_types": "full"}, "layer_types 'full'"),
        ({"per_layer_config": {"0": {"num_experts_per_tok": 2}}}, "per_layer_config: cannot be converted"),
        ({"rms_norm_eps": None}, "rms_norm_eps None: must be a number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6': must be a number"),
        ({"hidden_size": "big"}, "hidden_size 'big': must be a whole number above 0"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads 0: must be a whole number above 0"),
        ({"num_experts_per_tok": 129}, "--moe-router-topk 129: must lie between 1 and --num-experts 128"),
        ({"num_key_value_heads": 3}, "--num-query-groups 3: must divide --num-attention-heads 32"),
        ({"rope_theta": None}, "rope_theta None: must be a whole number above 0"),
        ({"rope_theta": math.inf}, "rope_theta inf: must be a whole number"),
        ({"rope_scaling": "none"}, "rope_scaling 'none': must be an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>': must be the id of a token"),
    ],
)
def test_config_json_values_without_counterpart_are_refused(change, message):
    contents = {**QWEN3_MOE, **change}
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read_config_json(contents, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned_absolute"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ({"swiglu": False}, "--swiglu False"),
        ({"disable_bias_linear": False}, "--disable-bias-linear False"),
        ({"num_experts": 4}, "--num-experts 4.*without --qk-layernorm"),
    ],
)
def test_settings_that_no_architecture_supports_are_refused(change, message):
    architecture_of(ModelSettings(**MODELS["llama"]))
    with pytest.raises(UserError, match=message):
        architecture_of(dataclasses.replace(ModelSettings(**MODELS["llama"]), **change))


LEFT_OUT = object()


@pytest.mark.parametrize(
    ("published", "change", "wanted"),
    [
        (LLAMA2, {"head_dim": None}, {"kv_channels": 128}),
        (LLAMA2, {"num_key_value_heads": None}, {"group_query_attention": False, "num_query_groups": 32}),
        (
            LLAMA2,
            {"attention_bias": None, "mlp_bias": None, "tie_word_embeddings": None},
            {"disable_bias_linear": True},
        ),
        (LLAMA2, {"attention_dropout": None, "initializer_range": None}, {"attention_dropout": 0.0}),
        (LLAMA2, {"rms_norm_eps": LEFT_OUT}, {"norm_epsilon": 1e-6}),
        (LLAMA2, {"max_position_embeddings": LEFT_OUT}, {"max_position_embeddings": 2048}),
        (LLAMA2, {"hidden_act": "swish"}, {"swiglu": True}),
        (LLAMA2, {"pretraining_tp": 2}, {"num_layers": 32}),
        (QWEN3_MOE, {"head_dim": LEFT_OUT}, {"kv_channels": 64}),
        (QWEN3_MOE, {"max_position_embeddings": LEFT_OUT}, {"max_position_embeddings": 32768}),
        (QWEN3_MOE, {"mlp_only_layers": None, "use_sliding_window": None}, {"num_experts": 128}),
        (QWEN3_MOE, {"layer_types": ["full_attention"] * 48}, {"num_layers": 48}),
    ],
)
def test_keys_that_transformers_omits_or_sets_to_null_are_read(published, change, wanted):
    contents = {key: value for key, value in {**published, **change}.items() if value is not LEFT_OUT}
    _, model, _ = read_config_json(contents, "config.json")
    assert {setting: getattr(model, setting) for setting in wanted} == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_missing_keys_take_transformers_defaults(architecture):
    theirs = transformers.AutoConfig.for_model(architecture.model_type)
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": getattr(theirs, "rope_theta", None)}
    found = {key: getattr(theirs, key, rope.get(key)) for key in {**SHARED_ABSENT, **architecture.absent}}
    assert found == {**SHARED_ABSENT, **architecture.absent}


# Keys of transformers' configurations that do not affect these models, or that it derives from other keys.
INERT = set(
    "chunk_size_feed_forward dtype head_dim id2label is_encoder_decoder label2id layer_types max_window_layers "
    "num_local_experts output_attentions output_hidden_states output_router_logits problem_type return_dict "
    "rope_parameters transformers_version _name_or_path".split()
)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_with_an_effect_is_written(name):
    written = config_json(ModelSettings(**MODELS[name]), 301, TokenIds(eos=7), "bfloat16")
    known = transformers.AutoConfig.for_model(written["model_type"]).to_dict()
    assert set(known) - set(written) <= INERT
    # Without this key, transformers 4.51 masks with a window of 4096.
    assert name.startswith("llama") or written["sliding_window"] is None


# For each setting a value that the models here do not have, grouped by its effect on an export.
CHANGES = {
    "exported": {
        "num_layers": 5, "hidden_size": 64, "ffn_hidden_size": 48, "num_attention_heads": 8,
        "group_query_attention": False, "num_query_groups": 4, "kv_channels": 12, "seq_length": 32,
        "max_position_embeddings": 99, "rotary_base": 999, "norm_epsilon": 1e-4,
        "untie_embeddings_and_output_weights": False, "attention_dropout": 0.5, "init_method_std": 0.5,
        "num_experts": 8, "moe_ffn_hidden_size": 8, "moe_router_topk": 1, "moe_aux_loss_coeff": 0.5,
    },
    "refused": {
        "position_embedding_type": "none", "rotary_percent": 0.5, "normalization": "LayerNorm", "swiglu": False,
        "disable_bias_linear": False, "qk_layernorm": False,
    },
    "warned about": {"moe_expert_capacity_factor": 0.5},
    # Settings of training or of the implementation.
    "without effect": {
        "tst_preset": "270m", "hidden_dropout": 0.5, "vocab_size": 300, "make_vocab_size_divisible_by": 64,
        "moe_z_loss_coeff": 0.5, "moe_token_drop_policy": "position", "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": True,
    },
}  # fmt: skip


def test_each_setting_is_exported_refused_warned_about_or_without_effect():
    fields = [field.name for field in dataclasses.fields(ModelSettings)]
    assert sorted(name for changes in CHANGES.values() for name in changes) == sorted(fields)
    base = ModelSettings(**MODELS["qwen3-moe"])

    def export(model):
        return config_json(model, 301, TokenIds(), "bfloat16"), inexpressible(model)

    assert export(base)[1] == []
    for fate, changes in CHANGES.items():
        for name, value in changes.items():
            model = dataclasses.replace(base, **{name: value})
            assert model != base, name
            if fate == "refused":
                with pytest.raises(
                    UserError, match="--num-experts" if name == "qk_layernorm" else f"--{name.replace('_', '-')} "
                ):
                    export(model)
                continue
            contents, lost = export(model)
            assert (contents != export(base)[0]) == (fate == "exported"), name
            assert [line.startswith(f"--{name.replace('_', '-')} {value}: ") for line in lost] == (
                [True] if fate == "warned about" else []
            ), name
