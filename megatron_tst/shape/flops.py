"""Floating-point operations of a training step, counted from the model's shape.

A superposed step runs the transformer over the same positions as an ordinary one, so the bag size does not appear.
"""

from megatron_tst.shape.model_shape import ModelShape

# The backward pass multiplies once more for the inputs' gradients and once more for the weights'.
PASSES = 3
# Dense bfloat16 peak of a card in 1e12 FLOPs per second, by a part of its name (NVIDIA's data sheets). A card for PCI
# Express comes before the faster one whose name its own begins with.
PEAK_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0,
    "H100": 989.0, "A100": 312.0,
}  # fmt: skip


def attention_flops_per_sequence(shape: ModelShape) -> int:
    """Return what scores and values of one layer take in a forward pass over one sequence, causal."""
    return 2 * 2 * (shape.seq_length * (shape.seq_length + 1) // 2) * shape.query_width


def head_flops_per_sequence(shape: ModelShape) -> int:
    """Return what the output layer takes in a forward pass over one sequence."""
    return 2 * shape.seq_length * shape.hidden_size * shape.padded_vocab_size


def forward_flops_per_sequence(shape: ModelShape) -> int:
    """Return the multiply-adds, times two, of one forward pass over one sequence.

    With L positions, hidden D, heads H of width E, K key-value heads, inner width F, vocabulary V::

        projections  2 L D (H E + 2 K E) + 2 L H E D
        attention    2 * 2 * L (L + 1) / 2 * H E           scores and values, causal
        MLP          2 L D F * (3 gated, 2 plain)          times top-k for experts, plus the router 2 L D N
        head         2 L D V

    Look-ups, norms, activations and the loss are not counted.
    """
    length, hidden = shape.seq_length, shape.hidden_size
    projections = 2 * length * hidden * shape.query_key_value_width + 2 * length * shape.query_width * hidden
    inner = shape.inner_width * (shape.moe_router_topk if shape.num_experts else 1)
    mlp = 2 * length * hidden * inner * (3 if shape.is_gated else 2)
    router = 2 * length * hidden * shape.num_experts
    layer = projections + attention_flops_per_sequence(shape) + mlp + router
    return shape.num_layers * layer + head_flops_per_sequence(shape)


def step_flops(shape: ModelShape, global_batch_size: int) -> int:
    """Return the floating-point operations of one optimizer step over all ranks, in either phase."""
    return PASSES * global_batch_size * forward_flops_per_sequence(shape)


def peak_tflops(device_name: str) -> float | None:
    """Return a card's dense bfloat16 peak in 1e12 FLOPs per second, or None for one that is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
