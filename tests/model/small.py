"""Small models of each kind, built like the model of a run."""

from typing import Any

from megatron_tst.config import ModelSettings, ParallelSettings, TrainingSettings
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.model import LossChoice, TSTGPTModel, build_gpt, transformer_config
from megatron_tst.shape import resolve_shape

LENGTH, VOCAB = 8, 53

DENSE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": LENGTH,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "disable_bias_linear": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 1,
}
MOE = {
    **DENSE,
    "num_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_token_dispatcher_type": "alltoall",
    "qk_layernorm": True,
}
GPT2 = {
    **DENSE,
    "group_query_attention": False,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "swiglu": False,
    "untie_embeddings_and_output_weights": False,
    "disable_bias_linear": False,
}


def small_model(
    shape: dict[str, Any],
    model_class: type = TSTGPTModel,
    bag_weights: str = "uniform",
    implementation: str = "native",
    **training: Any,
):
    model = ModelSettings(**shape)
    sizes = resolve_shape(model, VOCAB)
    config = transformer_config(model, sizes, TrainingSettings(**training), ParallelSettings(), find_libraries())
    loss = LossChoice(bag_weights, implementation=implementation)
    return build_gpt(config, model, sizes, loss, use_transformer_engine=False, model_class=model_class)
