"""The modules that a transformer layer consists of."""

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_tst.model.attention import ScaledDotProductAttention
from megatron_tst.model.norm import LayerNorm, RMSNorm


def block_spec(
    config: TransformerConfig, use_transformer_engine: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return the specification of the layers that this pipeline stage holds.

    The layers are Transformer Engine's, or else megatron-core's local ones with torch's attention and norms. Both have
    the same parameters under the same checkpoint keys.

    Args:
        config: megatron-core's configuration of the model.
        use_transformer_engine: whether to use Transformer Engine's layers.
        vp_stage: index of the virtual pipeline stage; None if stages are not interleaved.
    """
    if use_transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    if config.num_moe_experts is not None:
        # Experts cannot contain the norm, so Transformer Engine's spec keeps the norm under its own key.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
