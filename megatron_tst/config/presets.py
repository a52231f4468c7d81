"""Shapes of the paper's four models, as values of :class:`~megatron_tst.config.settings.ModelSettings`.

The dense models have the published shapes of SmolLM2-135M, SmolLM2-360M and SmolLM3-3B, with the Llama-3-8B tokenizer
and an untied output weight. 10B-A1B is a Qwen3 MoE with the Qwen3 tokenizer. The paper states neither the sequence
length nor the RoPE base of the dense runs: a length of 2048 divides their batch of 2^21 positions into 1024 sequences,
and a base of 500000 is that of Llama 3.
"""

from typing import Any

_LLAMA: dict[str, Any] = {
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "disable_bias_linear": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
_DENSE: dict[str, Any] = {
    **_LLAMA,
    "seq_length": 2048,
    "rotary_base": 500000,
    "norm_epsilon": 1e-5,
    "vocab_size": 128256,
}

PRESETS: dict[str, dict[str, Any]] = {
    "270m": {
        **_DENSE,
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "num_query_groups": 3,
    },
    "600m": {
        **_DENSE,
        "num_layers": 32,
        "hidden_size": 960,
        "ffn_hidden_size": 2560,
        "num_attention_heads": 15,
        "num_query_groups": 5,
    },
    "3b": {
        **_DENSE,
        "num_layers": 36,
        "hidden_size": 2048,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "norm_epsilon": 1e-6,
    },
    "10b-a1b": {
        **_LLAMA,
        "num_layers": 32,
        "hidden_size": 1536,
        "ffn_hidden_size": 512,
        "num_attention_heads": 24,
        "num_query_groups": 4,
        "kv_channels": 128,
        "qk_layernorm": True,
        "seq_length": 8192,
        "rotary_base": 50000,
        "norm_epsilon": 1e-6,
        "vocab_size": 151936,
        "num_experts": 128,
        "moe_ffn_hidden_size": 512,
        "moe_router_topk": 8,
        "moe_aux_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    },
}
