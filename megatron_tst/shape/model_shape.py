"""The sizes of a model. This is the only place that fills in sizes that settings leave open and derives others."""

import math
from dataclasses import dataclass

from megatron_tst.config import ModelSettings, ParallelSettings, require


@dataclass(frozen=True)
class ModelShape:
    """All sizes that determine a model's weights, FLOPs and memory.

    Fields that correspond to settings have their names; every field has a value.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream, D.
        num_attention_heads: query heads.
        num_query_groups: key-value heads; as many as query heads without grouped-query attention.
        kv_channels: width of one head.
        ffn_hidden_size: inner width of a dense feed-forward network.
        num_experts: experts per layer; 0 in a dense model.
        moe_ffn_hidden_size: inner width of one expert.
        moe_router_topk: experts that process each position; 0 in a dense model.
        seq_length: positions per sequence, L.
        max_position_embeddings: positions that the model can embed.
        vocab_size: tokens in the vocabulary, V.
        padded_vocab_size: rows of the embedding, and of the output layer, over all tensor-parallel ranks.
        layers_per_stage: layers of one pipeline stage.
        num_virtual_stages: chunks of layers that each pipeline stage holds; 1 without interleaving.
        is_gated: whether feed-forward networks have a gate projection beside the up projection.
        has_bias: whether linear layers have biases.
        has_qk_norms: whether queries and keys are normalised per head.
        has_position_table: whether position embeddings are learned.
        has_rope: whether position embeddings are rotary.
        norm_tensors: parameters of a norm per channel: 1 in RMSNorm (scale), 2 in LayerNorm (scale and bias).
        is_tied: whether the output layer shares the embedding's weight.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    num_experts: int
    moe_ffn_hidden_size: int
    moe_router_topk: int
    seq_length: int
    max_position_embeddings: int
    vocab_size: int
    padded_vocab_size: int
    layers_per_stage: int
    num_virtual_stages: int
    is_gated: bool
    has_bias: bool
    has_qk_norms: bool
    has_position_table: bool
    has_rope: bool
    norm_tensors: int
    is_tied: bool

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_width(self) -> int:
        """Width of all key heads together, which is also that of all value heads."""
        return self.num_query_groups * self.kv_channels

    @property
    def query_key_value_width(self) -> int:
        """Rows of the matrix that computes queries, keys and values."""
        return self.query_width + 2 * self.key_width

    @property
    def inner_width(self) -> int:
        """Inner width of one expert in an MoE model, of the feed-forward network in a dense one."""
        return self.moe_ffn_hidden_size if self.num_experts else self.ffn_hidden_size

    @property
    def gate_up_width(self) -> int:
        """Width of the gate and up projections of a dense feed-forward network together."""
        return 2 * self.ffn_hidden_size

    @property
    def expert_gate_up_width(self) -> int:
        """Width of the gate and up projections of one expert together."""
        return 2 * self.moe_ffn_hidden_size


def resolve_shape(
    model: ModelSettings, vocab_size: int | None = None, parallel: ParallelSettings | None = None
) -> ModelShape:
    """Return the sizes of a model under a parallel layout.

    Args:
        model: the model's settings.
        vocab_size: tokens in the vocabulary before padding; ``--vocab-size`` if not given.
        parallel: the layout, which determines vocabulary padding and pipeline stages; one rank if not given.

    Raises:
        UserError: if a required size is missing.
    """
    parallel = parallel or ParallelSettings()
    layers, hidden = require("--num-layers", model.num_layers), require("--hidden-size", model.hidden_size)
    heads = require("--num-attention-heads", model.num_attention_heads)
    vocabulary = require("--vocab-size", vocab_size or model.vocab_size)
    length = require("--seq-length", model.seq_length or model.max_position_embeddings)
    ffn, experts = model.ffn_hidden_size or 4 * hidden, model.num_experts or 0
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=model.num_query_groups if model.group_query_attention else heads,
        kv_channels=model.kv_channels or hidden // heads,
        ffn_hidden_size=ffn,
        num_experts=experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size or ffn,
        moe_router_topk=model.moe_router_topk if experts else 0,
        seq_length=length,
        max_position_embeddings=model.max_position_embeddings or length,
        vocab_size=vocabulary,
        padded_vocab_size=pad_vocabulary(
            vocabulary, model.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
        ),
        layers_per_stage=layers // parallel.pipeline_model_parallel_size,
        num_virtual_stages=virtual_stages(layers, parallel) or 1,
        is_gated=model.swiglu,
        has_bias=not model.disable_bias_linear,
        has_qk_norms=model.qk_layernorm,
        has_position_table=model.position_embedding_type == "learned_absolute",
        has_rope=model.position_embedding_type == "rope",
        norm_tensors=1 if model.normalization == "RMSNorm" else 2,
        is_tied=not model.untie_embeddings_and_output_weights,
    )


def pad_vocabulary(vocab_size: int, multiple: int) -> int:
    """Return the vocabulary size rounded up to a multiple, as Megatron-LM does."""
    return math.ceil(vocab_size / multiple) * multiple


def virtual_stages(num_layers: int, parallel: ParallelSettings) -> int | None:
    """Return the number of layer chunks per pipeline stage, or None without interleaving."""
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    return None if per_chunk is None else num_layers // parallel.pipeline_model_parallel_size // per_chunk
