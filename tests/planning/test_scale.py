"""A simulated run, compared with Young's formula computed by hand and with limits that must hold."""

import dataclasses
import math

import pytest

from megatron_tst.config import read_config
from megatron_tst.planning.scale import Assumptions, scale_run
from megatron_tst.shape.hardware import find_gpu

CONFIG = read_config(
    "--tst-preset 3b --micro-batch-size 1 --global-batch-size 1024 --train-iters 20000 --bf16 "
    "--use-distributed-optimizer --accumulate-allreduce-grads-in-fp32".split()
)
ASSUMPTIONS = Assumptions(
    mtbf_gpu_hours=1024.0, storage_gb_per_s_per_node=1.0, storage_gb_per_s=1000.0, restart_minutes=10
)


def scaled(num_gpus=1024, assumptions=ASSUMPTIONS, config=CONFIG):
    return scale_run(config, find_gpu("b200"), num_gpus, 0.4, 0.9, assumptions)


def test_the_interval_and_the_goodput_follow_youngs_formula():
    run = scaled()
    # One failure per hour; a checkpoint of 14 bytes per parameter, written by 128 nodes at 1 GB/s each.
    parameters = 3_336_114_176
    checkpoint_s = 14 * parameters / 128e9
    interval_s = math.sqrt(2 * checkpoint_s * 3600)
    assert run.checkpoint_s == pytest.approx(checkpoint_s, rel=0.01)
    assert run.save_interval_steps == pytest.approx(interval_s / run.layout.step.total, rel=0.01)
    lost = checkpoint_s / interval_s + (interval_s / 2 + 600) / 3600
    assert run.goodput == pytest.approx(1 / (1 + lost), rel=0.01)
    assert run.days == pytest.approx(20000 * run.layout.step.total / 86400)
    assert run.failures == pytest.approx(run.days / run.goodput * 24, rel=0.01)


def test_no_other_interval_loses_less():
    run = scaled()

    def lost(steps):
        seconds = steps * run.layout.step.total
        return run.checkpoint_s / seconds + seconds / 2 / 3600

    assert all(lost(run.save_interval_steps) <= lost(run.save_interval_steps * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_reliable_gpus_lose_no_time():
    reliable = scaled(assumptions=dataclasses.replace(ASSUMPTIONS, mtbf_gpu_hours=1e12))
    assert reliable.goodput == pytest.approx(1, abs=1e-4)
    assert scaled().goodput < 0.9


def test_more_gpus_need_fewer_days_but_not_in_proportion():
    few, many = scaled(64), scaled(16384)
    assert many.days < few.days
    assert many.days * 16384 > few.days * 64
    assert many.layout.step.bubble > 0


def test_a_batch_that_fits_no_layout_is_refused_with_a_reason():
    small = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, global_batch_size=1))
    run = scaled(16384, config=small)
    assert run.layout is None
    assert run.refusal.startswith("--global-batch-size 1")
