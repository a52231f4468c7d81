"""Parameters of a model, counted from its shape."""

from megatron_tst.config import ModelSettings


def count_parameters(model: ModelSettings, padded_vocab_size: int, *, active: bool = False) -> int:
    """Return the parameters of the whole model.

    With hidden D, heads H of width E, K key-value heads, inner width F, vocabulary V, N experts, c parameters of a norm
    per channel (1 for RMSNorm, 2 for LayerNorm)::

        embedding and head  V D, twice where untied; P D for learned positions
        attention           D (H E + 2 K E) + H E D, and 2 c E for norms of queries and keys
        MLP                 D F * (3 gated, 2 plain), N times for experts, plus the router N D
        norms               2 c D per layer, c D at the end
        biases              one per row of each matrix of a layer, where there are any

    Args:
        model: the shape.
        padded_vocab_size: V.
        active: whether to count only the experts that one position uses.
    """
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    hidden = model.hidden_size
    width = model.kv_channels or hidden // model.num_attention_heads
    queries = model.num_attention_heads * width
    keys = width * (model.num_query_groups if model.group_query_attention else model.num_attention_heads)
    norm = 1 if model.normalization == "RMSNorm" else 2
    experts = (model.moe_router_topk if active else model.num_experts) if model.num_experts else 1
    inner = (model.moe_ffn_hidden_size if model.num_experts else None) or model.ffn_hidden_size or 4 * hidden
    rows = inner * (2 if model.swiglu else 1)
    layer = hidden * (queries + 2 * keys) + queries * hidden + 2 * norm * hidden
    layer += 2 * norm * width if model.qk_layernorm else 0
    layer += experts * hidden * (rows + inner) + hidden * (model.num_experts or 0)
    if not model.disable_bias_linear:
        layer += queries + 2 * keys + hidden + experts * (rows + hidden)
    tables = padded_vocab_size * (2 if model.untie_embeddings_and_output_weights else 1)
    if model.position_embedding_type == "learned_absolute":
        tables += model.max_position_embeddings or model.seq_length or 0
    return model.num_layers * layer + tables * hidden + norm * hidden


def checkpoint_bytes(num_parameters: int, bf16: bool) -> int:
    """Return the bytes of a checkpoint: weights, and with the optimizer float32 main weights and two moments."""
    return num_parameters * ((2 if bf16 else 4) + 12)
