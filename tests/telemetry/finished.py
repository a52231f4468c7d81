"""Creates run directories of finished runs with losses that a test chooses."""

import dataclasses
from pathlib import Path

from megatron_tst.config import ModelSettings, RunConfig, SuperpositionSettings, TrainingSettings, dump_config
from megatron_tst.telemetry import MetricsFile, RecoveryMetrics, ValidMetrics
from tests.telemetry.lines import STEP

POSITIONS = 64  # per step


def write_run(folder: Path, valid: list[float], bag_size: int = 1, superposed: int = 0, seed: int = 1) -> Path:
    """Write a run of 10 steps per loss, evaluated every 10 steps; the first ``superposed`` tens of steps have bags."""
    folder.mkdir(parents=True)
    steps = 10 * len(valid)
    superposition = SuperpositionSettings(tst_bag_size=bag_size, tst_step_ratio=10 * superposed / steps)
    config = RunConfig(
        model=ModelSettings(num_layers=2),
        superposition=superposition,
        training=TrainingSettings(train_iters=steps, seed=seed),
    )
    (folder / "config.yaml").write_text(dump_config(config))
    file, tokens = MetricsFile(folder / "metrics.jsonl"), 0
    for number, loss in enumerate(valid, start=1):
        is_bags = number <= superposed
        tokens += 10 * POSITIONS * (bag_size if is_bags else 1)
        step, cost = 10 * number, {"flops": 1e9 * number, "gpu_hours": number / 4}
        line = {
            "step": step, "phase": 0 if is_bags or not superposed else 1, "bag_size": bag_size if is_bags else 1,
            "loss_kind": "mce" if is_bags else "ce", "data_tokens": tokens, "positions": step * POSITIONS,
        }  # fmt: skip
        file.write(dataclasses.replace(STEP, loss=loss, **line, **cost))
        file.write(ValidMetrics(step, loss, None, tokens, step * POSITIONS, **cost))
        if number == superposed + 1 and superposed:
            file.write(RecoveryMetrics(step, 10 * superposed, 0.25, 7))
    file.close()
    return folder
