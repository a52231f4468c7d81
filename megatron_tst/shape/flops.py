"""Floating-point operations of a training step, counted from the model's shape.

A superposed step runs the transformer over the same positions as an ordinary one, so the bag size does not appear.
"""

from megatron_tst.shape.model_shape import ModelShape

# A step costs three forward passes, because the backward pass computes gradients of the inputs and of the weights.
PASSES = 3
# Dense bfloat16 peak of a GPU in 1e12 FLOPs per second, by a part of its name (NVIDIA's data sheets). The first match
# counts, so a PCI Express variant precedes the faster GPU whose name is a prefix of its own.
PEAK_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0,
    "H100": 989.0, "A100": 312.0,
}  # fmt: skip


def attention_flops_per_sequence(shape: ModelShape) -> int:
    """Return the FLOPs of one layer's causal attention scores and values in a forward pass over one sequence."""
    return 2 * 2 * (shape.seq_length * (shape.seq_length + 1) // 2) * shape.query_width


def head_flops_per_sequence(shape: ModelShape) -> int:
    """Return the FLOPs of the output layer in a forward pass over one sequence."""
    return 2 * shape.seq_length * shape.hidden_size * shape.padded_vocab_size


def forward_flops_per_sequence(shape: ModelShape) -> int:
    """Return the FLOPs of one forward pass over one sequence: two per multiply-add.

    With L positions, hidden D, heads H of width E, K key-value heads, inner width F, vocabulary V::

        projections  2 L D (H E + 2 K E) + 2 L H E D
        attention    2 * 2 * L (L + 1) / 2 * H E           causal scores and values
        MLP          2 L D F * (3 if gated, else 2)        in MoE times top-k, plus 2 L D N for the router of N experts
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
    """Return a GPU's dense bfloat16 peak in 1e12 FLOPs per second, or None if the GPU is unknown."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
