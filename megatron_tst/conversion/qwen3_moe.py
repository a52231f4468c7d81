"""Qwen3-MoE, the architecture of the 10b-a1b preset: Qwen3 with a mixture of experts in every layer."""

from megatron_tst.conversion.llama import ATTENTION, FIRST, LAST
from megatron_tst.conversion.qwen3 import HEAD_NORMS
from megatron_tst.conversion.tables import GATE_UP, Architecture, Row

EXPERTS = (
    Row(
        "decoder.layers.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        ("hidden_size",),
    ),
    Row("decoder.layers.mlp.router.weight", ("model.layers.{layer}.mlp.gate.weight",), ("num_experts", "hidden_size")),
    Row(
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        (
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        ),
        ("expert_gate_up_width", "hidden_size"),
        GATE_UP,
    ),
    Row(
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
        ("hidden_size", "moe_ffn_hidden_size"),
    ),
)

QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rows=(*FIRST, *ATTENTION, *HEAD_NORMS, *EXPERTS, *LAST),
    qk_layernorm=True,
    experts=True,
    settings={
        "num_experts": "num_experts",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        "moe_aux_loss_coeff": "router_aux_loss_coef",
    },
    always={"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    # The softmax over the chosen experts equals the softmax over all experts, divided by the sum over the chosen ones.
    stated={"norm_topk_prob": True},
    inert={"sliding_window": None},
    absent={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    },
)
