"""Parameter counts of a model, computed from its shape."""

from dataclasses import dataclass

from megatron_tst.shape.model_shape import ModelShape


@dataclass(frozen=True)
class ParameterParts:
    """Parameter counts, separated by how ranks share the parameters.

    Attributes:
        layer_matrices: parameters of one layer that tensor parallelism splits: matrices and their biases.
        layer_copied: parameters of one layer that every tensor-parallel rank holds whole: norms, router, some biases.
        layer_experts: parameters of all experts of one layer.
        layer_active_experts: parameters of the experts of one layer that process one position.
        table: parameters of the token embedding; an untied output layer has as many.
        positions: parameters of learned position embeddings.
        last_norm: parameters of the norm before the output layer.
    """

    layer_matrices: int
    layer_copied: int
    layer_experts: int
    layer_active_experts: int
    table: int
    positions: int
    last_norm: int


def parameter_parts(shape: ModelShape) -> ParameterParts:
    """Return the parameter counts of a model's parts.

    With hidden D, heads H of width E, K key-value heads, inner width F, vocabulary V, P learned positions, N experts
    and c parameters of a norm per channel (1 in RMSNorm, 2 in LayerNorm)::

        table      V D, and P D for learned positions
        attention  D (H E + 2 K E) + H E D, and 2 c E for norms of queries and keys
        MLP        D F * (3 if gated, else 2), in MoE times N, plus N D for the router
        norms      2 c D per layer, and c D before the output layer
        biases     one per row of each matrix of a layer, if linear layers have biases
    """
    hidden, norm, num_experts = shape.hidden_size, shape.norm_tensors, shape.num_experts
    rows = shape.inner_width * (2 if shape.is_gated else 1)
    mlp = hidden * (rows + shape.inner_width) + (rows if shape.has_bias else 0)
    out_bias = hidden if shape.has_bias else 0
    attention = hidden * shape.query_key_value_width + shape.query_width * hidden
    attention += shape.query_key_value_width if shape.has_bias else 0
    head_norms = 2 * norm * shape.kv_channels if shape.has_qk_norms else 0
    copied = 2 * norm * hidden + head_norms + out_bias + num_experts * hidden
    return ParameterParts(
        layer_matrices=attention + (0 if num_experts else mlp),
        layer_copied=copied + (0 if num_experts else out_bias),
        layer_experts=num_experts * (mlp + out_bias),
        layer_active_experts=shape.moe_router_topk * (mlp + out_bias),
        table=shape.padded_vocab_size * hidden,
        positions=shape.max_position_embeddings * hidden if shape.has_position_table else 0,
        last_norm=norm * hidden,
    )


def count_parameters(shape: ModelShape, *, active: bool = False) -> int:
    """Return the parameter count of the whole model; ``active`` counts only the experts that process one position."""
    parts = parameter_parts(shape)
    experts = parts.layer_active_experts if active else parts.layer_experts
    layer = parts.layer_matrices + parts.layer_copied + experts
    tables = 1 if shape.is_tied else 2
    return shape.num_layers * layer + tables * parts.table + parts.positions + parts.last_norm


def checkpoint_bytes(num_parameters: int, bf16: bool) -> int:
    """Return the bytes of a checkpoint: weights, and the optimizer's float32 main weights and two moments."""
    return num_parameters * ((2 if bf16 else 4) + 12)
