"""The arguments of Megatron-LM that affect what a model computes."""

import dataclasses
import re

import pytest
from megatron.core.transformer import TransformerConfig

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.run_state import read_saved_arguments
from megatron_tst.checkpoint.stock_arguments import _REQUIRED, find_foreign, model_settings
from megatron_tst.config import ModelSettings
from tests.checkpoint.stock_trainer import SAVED_STEP, STOCK

VERSIONS = sorted(folder.name for folder in STOCK.iterdir())
# One argument of each kind.
FOREIGN = {
    "layernorm_zero_centered_gamma": True, "rotary_interleaved": True, "use_rope_scaling": True,
    "position_embedding_type": "yarn", "window_size": (128, 0), "softmax_type": "learnable", "squared_relu": True,
    "add_qkv_bias": True, "use_mup": True, "multi_latent_attention": True,
}  # fmt: skip

# Fields of the model's configuration that do not affect the function of the weights, except by rounding.
NEUTRAL = re.compile(
    # Initial values, dropout of probabilities, and losses and routing that only affect training.
    r"(.*_)?init_.*|perform_initialization|use_cpu_initialization|embedding_init.*|qk_clip.*|log_max_attention_logit|"
    r"calculate_per_token_loss|moe_(aux_loss|z_loss)_coeff|moe_router_(load_balancing_type|bias_update_rate|force_.*|"
    r"quantile_balancing_ema)|moe_input_jitter_eps|moe_token_dropping|moe_per_layer_logging|moe_enable_routing_replay|"
    # Dtypes and precision.
    r"fp8.*|fp4.*|fp16|bf16|.*_in_bf16|first_last_layers_bf16|params_dtype|.*_dtype|attention_softmax_in_fp32|"
    r"apply_query_key_layer_scaling|fp32_residual_connection|disable_bf16_reduced_precision_matmul|quant_recipe|"
    r"tp_only_amax_red|moe_router_padding_.*|use_te_activation_func|"
    # Devices, communication and speed.
    r".*parallel.*|.*pipeline.*|.*fusion.*|.*fused.*|.*fuser.*|.*overlap.*|.*recompute.*|.*offload.*|.*cuda_graph.*|"
    r"tp_comm.*|cp_comm.*|inference.*|use_inference.*|.*kitchen.*|moe_(hybridep|ncclep|deepep|flex|paged|permute|pad|"
    r"single|layer_recompute|enable_deepep|token_dispatcher|grouped_gemm|router_topk_limited|expert_rank|"
    r"shared_expert_overlap).*|.*_grouped_gemm.*|.*gtp.*|attention_backend|flash_.*|transformer_impl|.*wgrad.*|"
    r"batch_invariant_mode|deterministic_mode|use_te_rng_tracker|memory_efficient_layer_norm|persist_layer_norm|"
    r"symmetric_ar_type|mlp_chunks_.*|nccl_.*|high_priority_.*|distribute_saved_activations|timers|finalize_.*|.*_func|"
    r"barrier_with_L1_time|test_mode|config_logger_dir|variable_seq_lengths|max_seqlen_per_.*|microbatch_group.*|"
    r"use_ring_exchange_p2p|batch_p2p_.*|deallocate_.*|clone_scatter_.*|disable_parameter_transpose_cache|.*_buffers|"
    r"autocast_dtype|enable_autocast|grad_scale_func|no_sync_func|.*_sync_func|hetereogenous_dist_checkpoint|"
    r"heterogeneous_block_specs|moe_extended_tp|.*_activation_checkpoints|activation_func_fp8_.*|"
    # Parts that another field enables, or that next-token prediction does not use.
    r"mtp_.*|mamba_.*|is_hybrid_model|use_mamba_.*|linear_(conv|key|value|num)_.*|dsa_.*|mup_.*|window_attn_skip_freq|"
    r"mrope_section|moe_router_num_groups|moe_shared_expert_(gate|glu_interleave_size)|"
    # Fields that have another name among the arguments.
    r"num_moe_experts|gated_linear_unit|activation_func|softmax_scale"
)


def recorded(version: str) -> dict:
    return read_saved_arguments(CheckpointFolders(STOCK / version).of(SAVED_STEP))


@pytest.mark.parametrize("version", VERSIONS)
def test_settings_of_a_recorded_model_are_read(version):
    model = model_settings(recorded(version))
    assert (model.norm_epsilon, model.rotary_base, model.num_query_groups) == (1e-3, 5000, 2)
    assert (model.disable_bias_linear, model.untie_embeddings_and_output_weights) == (True, True)
    # The model has --vocab-size 263, to which its tokenizer may add tokens.
    assert model.vocab_size is None
    assert find_foreign(recorded(version)) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_unsupported_argument_is_named(name):
    assert find_foreign({**recorded(VERSIONS[1]), name: FOREIGN[name]}) == [f"{name}={FOREIGN[name]}"]


def test_biases_of_all_layers_include_those_of_the_queries():
    assert find_foreign({"add_bias_linear": True, "add_qkv_bias": True}) == []
    assert find_foreign({"add_bias_linear": False, "add_qkv_bias": True}) == ["add_qkv_bias=True"]


def test_moe_arguments_matter_only_for_moe_models():
    arguments = {**recorded(VERSIONS[1]), "moe_router_score_function": "sigmoid"}
    assert find_foreign(arguments) == []
    assert find_foreign({**arguments, "num_experts": 4}) == ["moe_router_score_function=sigmoid"]


def test_every_field_of_the_installed_configuration_is_classified():
    """A version with a new field fails here until the field is classified as affecting the function or not."""
    ours = {field.name for field in dataclasses.fields(ModelSettings)} | {"layernorm_epsilon", "add_bias_linear"}
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert {name for name in fields - ours - _REQUIRED.keys() if not NEUTRAL.fullmatch(name)} == set()
    assert not any(NEUTRAL.fullmatch(name) for name in (*_REQUIRED, "rotary_new_setting"))
