"""Simulates the same run on another number of GPUs, with failures and saves; every assumption is a field."""

import math
from dataclasses import dataclass

from megatron_tst.config import RunConfig
from megatron_tst.planning.layouts import Layout, group_refusals, search_layouts
from megatron_tst.planning.memory import shape_of
from megatron_tst.shape.hardware import Gpu
from megatron_tst.shape.parameters import checkpoint_bytes, count_parameters


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of the simulation.

    Attributes:
        mtbf_gpu_hours: GPU-hours between failures that end a run. Llama 3 had 419 failures in 54 days on 16384 GPUs.
        storage_gb_per_s_per_node: rate at which a node writes its part of a checkpoint, in 1e9 bytes per second.
        storage_gb_per_s: rate of the whole file system, in 1e9 bytes per second.
        restart_minutes: time from a failure to the next step, including loading the checkpoint.
    """

    mtbf_gpu_hours: float = 54 * 24 * 16384 / 419
    storage_gb_per_s_per_node: float = 2.0
    storage_gb_per_s: float = 200.0
    restart_minutes: float = 15.0


@dataclass(frozen=True)
class ScaledRun:
    """A simulated run on a number of GPUs.

    Attributes:
        num_gpus: number of GPUs.
        layout: fastest layout that fits; None if there is none.
        refusal: most common reason why no layout fits.
        days: duration of the whole run in days, without failures.
        failures: expected number of failures.
        checkpoint_s: time to write a checkpoint, in seconds.
        save_interval_steps: save interval with the least loss, by Young's formula: the square root of 2 x time to write
            x time between failures.
        goodput: fraction of the time that makes progress.
    """

    num_gpus: int
    layout: Layout | None
    refusal: str
    days: float = math.nan
    failures: float = math.nan
    checkpoint_s: float = math.nan
    save_interval_steps: int = 0
    goodput: float = math.nan


def scale_run(
    config: RunConfig, gpu: Gpu, num_gpus: int, efficiency: float, usable: float, assumptions: Assumptions
) -> ScaledRun:
    """Simulate a run on a number of GPUs, with its global batch size unchanged.

    A failure costs half a save interval and a restart; saving costs one write per interval.

    Args:
        config: settings of the run.
        gpu: kind of GPU.
        num_gpus: number of GPUs.
        efficiency: fraction of the GPU's peak at which matrix multiplications run.
        usable: fraction of the GPU's memory that tensors may take.
        assumptions: assumptions of the simulation.
    """
    fitting, others = search_layouts(config, gpu, num_gpus, efficiency, usable)
    if not fitting:
        return ScaledRun(num_gpus, None, group_refusals(others)[0][0])
    step = fitting[0].step
    assert step
    size = checkpoint_bytes(count_parameters(shape_of(fitting[0].config)), config.training.bf16)
    speed = min(assumptions.storage_gb_per_s, assumptions.storage_gb_per_s_per_node * num_gpus / gpu.per_node)
    checkpoint_s = size / (speed * 1e9)
    mtbf_s = assumptions.mtbf_gpu_hours * 3600 / num_gpus
    interval_s = max(math.sqrt(2 * checkpoint_s * mtbf_s), step.total)
    lost = checkpoint_s / interval_s + (interval_s / 2 + assumptions.restart_minutes * 60) / mtbf_s
    run_s = config.schedule.num_steps * step.total
    goodput = 1 / (1 + lost)
    return ScaledRun(
        num_gpus=num_gpus,
        layout=fitting[0],
        refusal="",
        days=run_s / 86400,
        failures=run_s / goodput / mtbf_s,
        checkpoint_s=checkpoint_s,
        save_interval_steps=max(round(interval_s / step.total), 1),
        goodput=goodput,
    )
