"""Llama, the architecture of the dense presets."""

from megatron_tst.conversion.tables import (
    EMBEDDING,
    GATE_UP,
    HEAD,
    QUERY_KEY_VALUE,
    VOCABULARY,
    Architecture,
    Row,
)

FIRST = (Row(EMBEDDING, ("model.embed_tokens.weight",), ("padded_vocab_size", "hidden_size"), VOCABULARY),)

ATTENTION = (
    Row(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        ("hidden_size",),
    ),
    Row(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        ("query_key_value_width", "hidden_size"),
        QUERY_KEY_VALUE,
    ),
    Row(
        "decoder.layers.self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",),
        ("hidden_size", "query_width"),
    ),
)

FEED_FORWARD = (
    Row(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        ("hidden_size",),
    ),
    Row(
        "decoder.layers.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        ("gate_up_width", "hidden_size"),
        GATE_UP,
    ),
    Row(
        "decoder.layers.mlp.linear_fc2.weight",
        ("model.layers.{layer}.mlp.down_proj.weight",),
        ("hidden_size", "ffn_hidden_size"),
    ),
)

LAST = (
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden_size",)),
    Row(HEAD, ("lm_head.weight",), ("padded_vocab_size", "hidden_size"), VOCABULARY),
)

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    rows=(*FIRST, *ATTENTION, *FEED_FORWARD, *LAST),
    qk_layernorm=False,
    experts=False,
    always={"mlp_bias": False},
    inert={"pretraining_tp": 1},  # how matrices were sharded when the model was trained
    absent={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
