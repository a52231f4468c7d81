"""Output of a run while it runs: metrics, progress display, run directory and sinks."""

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
    "read_metrics",
    "short",
    "start_log_screen",
    "versions",
]
