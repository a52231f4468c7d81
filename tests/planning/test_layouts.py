"""The search for layouts: those that fit can be started, and the others are refused with a reason."""

import dataclasses

import pytest

from megatron_tst.config import check_layout, read_config
from megatron_tst.planning.layouts import distinct, judge_layout, search_layouts
from megatron_tst.planning.memory import pipeline_memory
from megatron_tst.shape.hardware import find_gpu

COMMON = "--micro-batch-size 1 --global-batch-size 1024 --train-iters 10 --bf16 --use-distributed-optimizer "


@pytest.fixture(scope="module")
def moe():
    return read_config(f"--tst-preset 10b-a1b {COMMON}".split())


@pytest.fixture(scope="module")
def found(moe):
    return search_layouts(moe, find_gpu("h100"), 64, 0.2)


def test_found_layouts_fit_and_can_be_started(found):
    fitting, _ = found
    assert len(fitting) > 20
    for layout in fitting:
        check_layout(layout.config)
        assert layout.fullest.total <= 0.9 * 79.6 * 2**30


def test_the_fastest_comes_first(found):
    times = [layout.step.total for layout in found[0]]
    assert times == sorted(times)


def test_only_the_fastest_micro_batch_size_is_shown(found):
    fitting, _ = found
    shown = distinct(fitting)
    assert shown[0] is fitting[0]
    assert len({layout.config.parallel for layout in shown}) == len({layout.config.parallel for layout in fitting})
    assert 1 < len(shown) < len(fitting)


def test_each_refusal_has_a_reason(found):
    _, others = found
    reasons = {layout.refusal for layout in others}
    assert any("--num-query-groups 4" in reason for reason in reasons)
    assert any("GiB of memory" in reason for reason in reasons)
    assert all(layout.refusal for layout in others)


def test_a_layout_that_needs_too_much_memory_is_refused(moe):
    gpu = find_gpu("b200")
    large = dataclasses.replace(moe, training=dataclasses.replace(moe.training, micro_batch_size=16))
    assert judge_layout(moe, gpu, 64, 0.2, 0.9).refusal is None
    assert "GiB of memory, 161 can be used" in judge_layout(large, gpu, 64, 0.2, 0.9).refusal


def test_optimizer_memory_per_gpu_shrinks_with_more_gpus(moe):
    few, many = (pipeline_memory(moe, number)[0].optimizer for number in (8, 64))
    assert few == pytest.approx(8 * many, rel=1e-6)


def test_ranks_that_do_not_divide_the_gpus_are_refused(moe):
    parallel = dataclasses.replace(moe.parallel, pipeline_model_parallel_size=32)
    refusal = judge_layout(dataclasses.replace(moe, parallel=parallel), find_gpu("b200"), 48, 0.2, 0.9).refusal
    assert refusal == "tp x pp x cp = 32: must divide 48 GPUs"
