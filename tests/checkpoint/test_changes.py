"""Which settings a run may change when it goes on from a checkpoint."""

from dataclasses import replace

import pytest

from megatron_tst.checkpoint.changes import find_changes
from megatron_tst.config import OptimizerSettings, ParallelSettings, RunConfig, SuperpositionSettings, TrainingSettings

SAVED = RunConfig(training=TrainingSettings(train_iters=10), optimizer=OptimizerSettings(lr=1e-3))


def test_equal_settings_have_no_changes():
    assert find_changes(SAVED, SAVED) == []


@pytest.mark.parametrize(
    "wanted",
    [
        replace(SAVED, training=replace(SAVED.training, train_iters=20, eval_interval=7, micro_batch_size=3)),
        replace(SAVED, parallel=ParallelSettings(tensor_model_parallel_size=4)),
    ],
)
def test_what_any_start_may_change_is_none(wanted):
    assert find_changes(SAVED, wanted) == []


def test_what_makes_another_run_is_binding():
    wanted = replace(SAVED, superposition=SuperpositionSettings(tst_bag_size=8))
    (change,) = find_changes(SAVED, wanted)
    assert change.is_binding
    assert str(change) == "--tst-bag-size 8: the checkpoint was made with 1"


def test_a_rate_is_told_but_not_binding():
    (change,) = find_changes(SAVED, replace(SAVED, optimizer=OptimizerSettings(lr=2e-3)))
    assert not change.is_binding
    assert change.flag == "--lr"
