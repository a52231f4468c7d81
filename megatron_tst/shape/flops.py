"""Floating-point operations of a training step, counted from the model's shape.

A superposed step runs the transformer over the same positions as an ordinary one, so the bag size does not appear.
"""

from megatron_tst.config import ModelSettings

# The backward pass multiplies once more for the inputs' gradients and once more for the weights'.
PASSES = 3
# Dense bfloat16 peak of a card in 1e12 FLOPs per second, by a part of its name (NVIDIA's data sheets). A card for PCI
# Express comes before the faster one whose name its own begins with.
PEAK_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0,
    "H100": 989.0, "A100": 312.0,
}  # fmt: skip


def attention_flops_per_sequence(model: ModelSettings) -> int:
    """Return what scores and values of one layer take in a forward pass over one sequence, causal."""
    assert model.hidden_size and model.num_attention_heads and model.seq_length
    queries = model.num_attention_heads * (model.kv_channels or model.hidden_size // model.num_attention_heads)
    return 2 * 2 * (model.seq_length * (model.seq_length + 1) // 2) * queries


def forward_flops_per_sequence(model: ModelSettings, padded_vocab_size: int) -> int:
    """Return the multiply-adds, times two, of one forward pass over one sequence.

    With L positions, hidden D, heads H of width E, K key-value heads, inner width F, vocabulary V::

        projections  2 L D (H E + 2 K E) + 2 L H E D
        attention    2 * 2 * L (L + 1) / 2 * H E           scores and values, causal
        MLP          2 L D F * (3 gated, 2 plain)          times top-k for experts, plus the router 2 L D N
        head         2 L D V

    Look-ups, norms, activations and the loss are not counted.

    Args:
        model: the shape.
        padded_vocab_size: V, as the head computes it.
    """
    assert model.num_layers and model.hidden_size and model.num_attention_heads and model.seq_length
    length, hidden = model.seq_length, model.hidden_size
    head_width = model.kv_channels or hidden // model.num_attention_heads
    queries = model.num_attention_heads * head_width
    groups = model.num_query_groups if model.group_query_attention else model.num_attention_heads
    projections = 2 * length * hidden * (queries + 2 * groups * head_width) + 2 * length * queries * hidden
    attention = attention_flops_per_sequence(model)
    matrices = 3 if model.swiglu else 2
    inner = model.ffn_hidden_size or 4 * hidden
    if model.num_experts:
        inner = (model.moe_ffn_hidden_size or inner) * model.moe_router_topk
    mlp = 2 * length * hidden * inner * matrices
    router = 2 * length * hidden * (model.num_experts or 0)
    return model.num_layers * (projections + attention + mlp + router) + 2 * length * hidden * padded_vocab_size


def step_flops(model: ModelSettings, padded_vocab_size: int, global_batch_size: int) -> int:
    """Return the floating-point operations of one optimizer step over all ranks, in either phase."""
    return PASSES * global_batch_size * forward_flops_per_sequence(model, padded_vocab_size)


def peak_tflops(device_name: str) -> float | None:
    """Return a card's dense bfloat16 peak in 1e12 FLOPs per second, or None for one that is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
