"""Every figure of a metric line, compared with arithmetic by hand; the test sets the clock."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from megatron_tst.shape import resolve_shape, step_flops
from megatron_tst.telemetry import read_metrics
from megatron_tst.telemetry.run_metrics import StepTimes
from megatron_tst.training.evaluation import Evaluation
from megatron_tst.training.metrics_logger import MetricsLogger
from megatron_tst.training.step import StepReport
from tests.training.runs import arguments, build_here

# 8 steps of 4 sequences of 16 positions, the first 4 with bags of 4; a line is logged every other step.
EXTRA = "--tst-bag-size 4 --tst-steps 4 --log-interval 2"
POSITIONS = 4 * 16


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("megatron_tst.training.step_timer.time", clock)
    return clock


@pytest.fixture
def run(here, corpus, tokenizer, tmp_path: Path):
    run = build_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", EXTRA))
    device = dataclasses.replace(run.device, name="NVIDIA H100 80GB HBM3")
    yield dataclasses.replace(run, device=device, gpu_hours=5.0)
    run.directory.leave()


def report(loss):
    return StepReport(
        loss=torch.tensor(loss), grad_norm=0.5, lr_by_group={"decay": 2e-3, "no_decay": 1e-3},
        is_applied=True, times=StepTimes(forward_backward_s=2.0, optimizer_s=0.5, communication_s=0.25),
    )  # fmt: skip


def record_all(run, clock, step_s=lambda step: 4.0):
    """Record all steps, with an evaluation of 1000 seconds between steps 3 and 4."""
    metrics = MetricsLogger(run)
    with metrics.progress:
        for step in range(1, 9):
            with metrics.timer.reading():
                clock.now += 1.0
            clock.now += step_s(step) - 1.0
            metrics.record(step, run.schedule.phase_at(step - 1), report(float(step)))
            if step == 3:
                with metrics.timer.paused():
                    clock.now += 1000.0
                    metrics.record_valid(step, Evaluation(3.0, 1.5))
    metrics.close()
    return read_metrics(run.directory.metrics)


def test_a_metric_line_matches_arithmetic_by_hand(run, clock):
    lines = record_all(run, clock)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    flops = step_flops(resolve_shape(run.config.model, run.shape.vocab_size), 4)
    last = steps[-1]
    tflops = flops / 4.0 / 1e12
    expected = {
        "step_time_s": 4.0, "positions_per_s": POSITIONS / 4, "data_tokens_per_s": POSITIONS / 4,
        "tflops_per_gpu": tflops, "mfu": tflops / 989, "data_time_s": 1.0, "forward_backward_time_s": 2.0,
        "optimizer_time_s": 0.5, "communication_time_s": 0.25, "flops": 8 * flops, "gpu_hours": 5 + 32 / 3600,
        "loss": 8.0, "lr": 2e-3, "grad_norm": 0.5, "positions": 8 * POSITIONS, "data_tokens": 20 * POSITIONS,
    }  # fmt: skip
    assert {name: last[name] for name in expected} == {name: pytest.approx(value) for name, value in expected.items()}
    assert last["lr_by_group"] == {"decay": 2e-3, "no_decay": 1e-3}
    # Bags of four tokens read four times the text in the same time.
    assert steps[0]["data_tokens_per_s"] == pytest.approx(4 * POSITIONS / 4)
    # The 1000 seconds of the evaluation are counted to no step.
    assert steps[1]["step_time_s"] == pytest.approx(4.0)
    for phase, line in ((0, steps[0]), (1, steps[-1])):
        read = (2 if phase == 0 else 4) * 4 / run.data.train.phases[phase].parts[0].samples_per_epoch
        assert line["data_epochs"] == pytest.approx(read, rel=0.01)
    assert 0.05 < last["memory_gib"] < 20


def test_an_evaluation_line_matches_arithmetic_by_hand(run, clock):
    (line,) = [line for line in record_all(run, clock) if "valid_loss" in line]
    assert (line["step"], line["valid_loss"], line["bits_per_byte"]) == (3, 3.0, 1.5)
    assert (line["data_tokens"], line["positions"]) == (3 * 4 * POSITIONS, 3 * POSITIONS)
    assert line["gpu_hours"] == pytest.approx(5 + 12 / 3600)


def test_the_time_left_counts_phases_and_pauses(run, clock, monkeypatch):
    shown = []
    monkeypatch.setattr("megatron_tst.telemetry.TrainingProgress.show_step", lambda _, line, left: shown.append(left))
    record_all(run, clock, step_s=lambda step: 4.0 if step <= 4 else 3.0)
    # After 2 steps the second phase's pace is unknown; after 4 there was a pause of 1000 s; after 6 the pace is known.
    assert shown == pytest.approx([6 * 4.0, 4 * 4.0 + 4 * 250, 2 * 3.0 + 2 * 1000 / 6, 0.0])


def test_mfu_is_null_on_an_unknown_gpu(run, clock):
    run = dataclasses.replace(run, device=dataclasses.replace(run.device, name="CPU, 1 threads"))
    assert all(line["mfu"] is None for line in record_all(run, clock) if "loss" in line)


def test_a_skipped_step_is_logged_with_its_samples(run, clock):
    metrics = MetricsLogger(run)
    broken = dataclasses.replace(report(math.nan), is_applied=False, grad_norm=math.inf)
    with metrics.progress:
        metrics.record(6, run.schedule.phase_at(5), broken)
    metrics.close()
    (line,) = read_metrics(run.directory.metrics)
    assert (line["step"], line["phase"], line["first_sample"], line["last_sample"]) == (6, 1, 4, 7)
    assert (line["skipped_loss"], line["skipped_grad_norm"]) == ("nan", "inf")
