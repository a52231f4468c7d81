"""Metric lines for tests that write and read them."""

from megatron_tst.telemetry import StepMetrics

STEP = StepMetrics(
    step=2, phase=0, bag_size=4, loss_kind="mce", loss=3.5, lr=1e-3, lr_by_group={"decay": 1e-3, "no_decay": 1e-3},
    grad_norm=0.7, data_tokens=800, positions=200, flops=2e9, gpu_hours=0.25, step_time_s=0.1, data_tokens_per_s=4000.0,
    positions_per_s=1000.0, tflops_per_gpu=0.01, mfu=None, data_time_s=0.0, forward_backward_time_s=0.06,
    optimizer_time_s=0.03, communication_time_s=0.01, data_epochs=0.5, memory_gib=1.5,
)  # fmt: skip
