"""What a run tells: metrics, FLOPs, progress, its directory, and comparisons of runs."""

from megatron_tst.telemetry.flops import forward_flops_per_sequence, step_flops
from megatron_tst.telemetry.metrics import (
    ExpertMetrics,
    Metrics,
    MetricsFile,
    RecoveryMetrics,
    SkippedMetrics,
    StepMetrics,
    SwitchMetrics,
    ValidMetrics,
    read_metrics,
)
from megatron_tst.telemetry.progress import TrainingProgress, short
from megatron_tst.telemetry.run_directory import RunDirectory, start_log_screen, versions

__all__ = [
    "ExpertMetrics",
    "Metrics",
    "MetricsFile",
    "RecoveryMetrics",
    "RunDirectory",
    "SkippedMetrics",
    "StepMetrics",
    "SwitchMetrics",
    "TrainingProgress",
    "ValidMetrics",
    "forward_flops_per_sequence",
    "read_metrics",
    "short",
    "start_log_screen",
    "step_flops",
    "versions",
]
