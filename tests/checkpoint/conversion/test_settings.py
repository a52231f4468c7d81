"""config.json and our settings, each read by the other side's own reader."""

import dataclasses
import json

import pytest

from megatron_tst.checkpoint.conversion.settings import architecture_of, config_json, read_config_json
from megatron_tst.config import PRESETS, ModelSettings, UserError
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
def test_presets_survive_the_way_there_and_back(preset):
    model = ModelSettings(**PRESETS[preset])
    contents = json.loads(json.dumps(config_json(model, 128, 7, "bfloat16")))
    architecture, back = read_config_json(contents, "config.json")
    assert architecture is architecture_of(model)
    same = (*PRESETS[preset].keys() - {"vocab_size", "seq_length", "kv_channels"},)
    for setting in set(same) - {"moe_token_dispatcher_type", "moe_grouped_gemm"}:  # how, not what
        assert getattr(back, setting) == getattr(model, setting), setting
    assert (back.vocab_size, back.max_position_embeddings) == (128, model.seq_length)
    assert back.kv_channels == (model.kv_channels or model.hidden_size // model.num_attention_heads)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_was_meant(name, tmp_path):
    model = ModelSettings(**{**MODELS[name], "attention_dropout": 0.25, "init_method_std": 0.03})
    contents = config_json(model, 301, 7, "bfloat16")
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
    _, moe = read_config_json(QWEN3_MOE, "config.json")
    assert (moe.num_experts, moe.moe_router_topk, moe.rotary_base, moe.kv_channels) == (128, 8, 1000000, 128)
    assert moe.qk_layernorm and moe.untie_embeddings_and_output_weights
    _, llama = read_config_json(LLAMA2, "config.json")
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
        ({"rms_norm_eps": None}, "rms_norm_eps: is missing"),
        ({"head_dim": None}, "head_dim: is missing"),
        ({"hidden_size": "big"}, "model.hidden_size 'big'"),
    ],
)
def test_what_megatron_core_does_not_compute_is_refused(change, message):
    contents = {key: value for key, value in {**QWEN3_MOE, **change}.items() if value is not None}
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
def test_what_no_architecture_says_is_refused(change, message):
    architecture_of(ModelSettings(**MODELS["llama"]))
    with pytest.raises(UserError, match=message):
        architecture_of(dataclasses.replace(ModelSettings(**MODELS["llama"]), **change))
