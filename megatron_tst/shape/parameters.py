"""Parameters of a model, counted from its shape."""

from dataclasses import dataclass

from megatron_tst.config import ModelSettings


@dataclass(frozen=True)
class ParameterParts:
    """Parameters by how ranks share them.

    Attributes:
        layer_matrices: of one layer: matrices and their biases that tensor parallelism splits.
        layer_copied: of one layer: what every tensor-parallel rank holds whole: norms, router, some biases.
        layer_experts: of one layer: all its experts.
        layer_active_experts: of these, the experts that one position uses.
        table: the embedding of all words; as much again for an output weight of its own.
        positions: learned positions.
        last_norm: the norm before the output.
    """

    layer_matrices: int
    layer_copied: int
    layer_experts: int
    layer_active_experts: int
    table: int
    positions: int
    last_norm: int


def parameter_parts(model: ModelSettings, padded_vocab_size: int) -> ParameterParts:
    """Return the parameters by part.

    With hidden D, heads H of width E, K key-value heads, inner width F, vocabulary V, N experts, c parameters of a norm
    per channel (1 for RMSNorm, 2 for LayerNorm)::

        table      V D; learned positions P D
        attention  D (H E + 2 K E) + H E D, and 2 c E for norms of queries and keys
        MLP        D F * (3 gated, 2 plain), N times for experts, plus the router N D
        norms      2 c D per layer, c D at the end
        biases     one per row of each matrix of a layer, where there are any

    Args:
        model: the shape.
        padded_vocab_size: V.
    """
    assert model.num_layers and model.hidden_size and model.num_attention_heads
    hidden = model.hidden_size
    width = model.kv_channels or hidden // model.num_attention_heads
    queries = model.num_attention_heads * width
    keys = width * (model.num_query_groups if model.group_query_attention else model.num_attention_heads)
    norm = 1 if model.normalization == "RMSNorm" else 2
    inner = (model.moe_ffn_hidden_size if model.num_experts else None) or model.ffn_hidden_size or 4 * hidden
    rows = inner * (2 if model.swiglu else 1)
    has_bias = not model.disable_bias_linear
    mlp = hidden * (rows + inner) + (rows if has_bias else 0)
    out_bias = hidden if has_bias else 0
    num_experts = model.num_experts or 0
    attention = hidden * (queries + 2 * keys) + queries * hidden + (queries + 2 * keys if has_bias else 0)
    copied = 2 * norm * hidden + (2 * norm * width if model.qk_layernorm else 0) + out_bias + num_experts * hidden
    learned = model.position_embedding_type == "learned_absolute"
    return ParameterParts(
        layer_matrices=attention + (0 if num_experts else mlp),
        layer_copied=copied + (0 if num_experts else out_bias),
        layer_experts=num_experts * (mlp + out_bias),
        layer_active_experts=(model.moe_router_topk if num_experts else 0) * (mlp + out_bias),
        table=padded_vocab_size * hidden,
        positions=(model.max_position_embeddings or model.seq_length or 0) * hidden if learned else 0,
        last_norm=norm * hidden,
    )


def count_parameters(model: ModelSettings, padded_vocab_size: int, *, active: bool = False) -> int:
    """Return the parameters of the whole model.

    Args:
        model: the shape.
        padded_vocab_size: columns of the head.
        active: whether to count only the experts that one position uses.
    """
    assert model.num_layers
    parts = parameter_parts(model, padded_vocab_size)
    experts = parts.layer_active_experts if active else parts.layer_experts
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    layer = parts.layer_matrices + parts.layer_copied + experts
    return model.num_layers * layer + tables * parts.table + parts.positions + parts.last_norm


def checkpoint_bytes(num_parameters: int, bf16: bool) -> int:
    """Return the bytes of a checkpoint: weights, and with the optimizer float32 main weights and two moments."""
    return num_parameters * ((2 if bf16 else 4) + 12)
