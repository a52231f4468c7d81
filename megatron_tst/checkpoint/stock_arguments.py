"""Model settings from the ``args`` that Megatron-LM stores in its checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_tst.config import ModelSettings

# Arguments that affect what a model computes with its weights, and the values that the models here support.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "add_qkv_bias": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "linear_attention_freq": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_layer_freq": (1,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_group_topk": (None,),
    "moe_router_pre_softmax": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "openai_gelu": (False,),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rope_type": (None, "rope"),
    "rotary_interleaved": (False,),
    "rotary_scaling_factor": (1.0,),
    "rotary_seq_len_interpolation_factor": (None,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "use_mup": (False,),
    "use_rope_scaling": (False,),
    "window_size": (None,),
}
# Prefix of arguments that affect only MoE models.
_EXPERTS = "moe_"
# Settings that have another meaning in Megatron-LM, or that do not affect the model's function.
_NOT_READ = {"tst_preset", "vocab_size", "moe_token_dispatcher_type", "moe_aux_loss_coeff", "moe_grouped_gemm"}


def model_settings(arguments: Mapping[str, Any]) -> ModelSettings:
    """Return the model settings in the arguments, and defaults for those that are missing.

    The vocabulary size is not read, because tokenizers may add tokens to Megatron-LM's ``vocab_size``.
    """
    names = {field.name for field in dataclasses.fields(ModelSettings)} - _NOT_READ
    known = {name: arguments[name] for name in names if name in arguments}
    if "layernorm_epsilon" in arguments:
        known["norm_epsilon"] = arguments["layernorm_epsilon"]
    if "add_bias_linear" in arguments:
        known["disable_bias_linear"] = not arguments["add_bias_linear"]
    return ModelSettings(**known)


def find_foreign(arguments: Mapping[str, Any]) -> list[str]:
    """Return, as ``name=value``, the arguments that no model here supports."""
    has_experts = arguments.get("num_experts") is not None
    if arguments.get("add_bias_linear"):
        # Megatron-LM sets it where all linear layers have biases, those of the queries, keys and values among them.
        arguments = {**arguments, "add_qkv_bias": False}
    return [
        f"{name}={arguments[name]}"
        for name, accepted in _REQUIRED.items()
        if name in arguments and arguments[name] not in accepted and (has_experts or not name.startswith(_EXPERTS))
    ]
