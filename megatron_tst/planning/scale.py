"""The same run on many more cards: what it sends, waits for, loses and saves. Every assumption is a field."""

import math
from dataclasses import dataclass

from megatron_tst.config import RunConfig
from megatron_tst.planning.layouts import Layout, group_refusals, search_layouts
from megatron_tst.planning.memory import shape_of
from megatron_tst.shape.hardware import Gpu
from megatron_tst.shape.parameters import checkpoint_bytes, count_parameters


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted.

    Attributes:
        mtbf_gpu_hours: card-hours between failures that end a run. Llama 3's 54 days on 16384 cards had 419.
        storage_gb_per_s_per_node: at which a node writes its part of a checkpoint, 1e9 bytes per second.
        storage_gb_per_s: at which the file system takes all parts.
        restart_minutes: from a failure to the next step, the checkpoint loaded.
    """

    mtbf_gpu_hours: float = 54 * 24 * 16384 / 419
    storage_gb_per_s_per_node: float = 2.0
    storage_gb_per_s: float = 200.0
    restart_minutes: float = 15.0


@dataclass(frozen=True)
class ScaledRun:
    """A run on a number of cards.

    Attributes:
        num_gpus: cards.
        layout: the fastest that fits; None if none does.
        refusal: why none does.
        days: of the whole run, without failures.
        failures: expected.
        checkpoint_s: to write one.
        save_interval_steps: that loses least, by Young's formula: the root of 2 x writing time x time between failures.
        goodput: share of the time that makes progress.
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
    """Put a run, its global batch unchanged, on a number of cards.

    Time lost to a failure is half an interval and a restart; time lost to saving is one write per interval.

    Args:
        config: the run.
        gpu: the card.
        num_gpus: how many of them.
        efficiency: share of the card's peak that multiplications run at.
        usable: share of the card's memory that tensors may take.
        assumptions: what is taken for granted.
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
