import json
from pathlib import Path

import pytest

from megatron_tst.config import RunConfig, TrainingSettings, UserError, dump_config
from megatron_tst.telemetry.status import read_status

STEP = {"phase": 0, "bag_size": 1, "loss_kind": "ce", "loss": 3.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(dump_config(RunConfig(training=TrainingSettings(train_iters=100))))
    lines = [{**STEP, "step": step, "step_time_s": seconds} for step, seconds in ((10, 9.0), (20, 2.0), (30, 2.0))]
    lines.insert(2, {"step": 20, "valid_loss": 2.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_status_of_a_running_run_is_read(run: Path):
    status = read_status(run)
    assert (status.step, status.num_steps, status.num_phases, status.valid_loss) == (30, 100, 1, 2.5)
    # The pace is a median, so the slow first step does not affect the estimate.
    assert status.seconds_left == 70 * 2.0
    assert (status.is_complete, status.checkpoint) == (False, None)


@pytest.mark.parametrize(
    ("steps", "tracker", "taken"),
    [
        ([], None, None), ([], "25", None), ([10, 20], "20", 20), ([10, 20], "10", 10), ([10, 20], "15", 10),
        ([10, 20], "5", None), ([10, 20], "", 20), ([10, 20], None, 20),
    ],
)  # fmt: skip
def test_the_checkpoint_is_the_one_that_a_resumed_run_loads(run: Path, steps, tracker, taken):
    for step in steps:
        (run / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)
    if tracker is not None:
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(tracker)
    (run / "checkpoints" / "iter_0000015.replaced").mkdir(parents=True)
    assert read_status(run).checkpoint == taken


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_status(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no logged step yet"):
        read_status(tmp_path)
