"""What a run tells: metrics, FLOPs, progress, its directory, and comparisons of runs."""

from megatron_tst.telemetry.flops import forward_flops_per_sequence, step_flops
from megatron_tst.telemetry.metrics import ExpertMetrics, MetricsFile, StepMetrics, ValidMetrics, read_metrics
from megatron_tst.telemetry.progress import TrainingProgress, short
from megatron_tst.telemetry.run_directory import RunDirectory, versions

__all__ = [
    "ExpertMetrics",
    "MetricsFile",
    "RunDirectory",
    "StepMetrics",
    "TrainingProgress",
    "ValidMetrics",
    "forward_flops_per_sequence",
    "read_metrics",
    "short",
    "step_flops",
    "versions",
]
