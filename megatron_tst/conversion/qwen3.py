"""Qwen3: Llama with a norm on each query and key head."""

from megatron_tst.conversion.llama import ATTENTION, FEED_FORWARD, FIRST, LAST
from megatron_tst.conversion.tables import Architecture, Row

HEAD_NORMS = (
    Row(
        "decoder.layers.self_attention.q_layernorm.weight",
        ("model.layers.{layer}.self_attn.q_norm.weight",),
        ("kv_channels",),
    ),
    Row(
        "decoder.layers.self_attention.k_layernorm.weight",
        ("model.layers.{layer}.self_attn.k_norm.weight",),
        ("kv_channels",),
    ),
)

QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    rows=(*FIRST, *ATTENTION, *HEAD_NORMS, *FEED_FORWARD, *LAST),
    qk_layernorm=True,
    experts=False,
    always={"use_sliding_window": False},
    # If this key is missing, transformers 4.51 assumes 4096 and masks with it although no window is used.
    inert={"sliding_window": None},
    absent={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
)
