"""Searches for the parallel layouts of a run that fit into GPU memory, the fastest first."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_tst.config import RunConfig, UserError, check_layout, global_batch_size
from megatron_tst.planning.memory import Memory, data_parallel_size, micro_batch_size, pipeline_memory, shape_of
from megatron_tst.planning.step_time import StepTime, estimate_step
from megatron_tst.shape.hardware import Gpu

# Fraction of a GPU's memory that remains after the driver, NCCL's buffers and fragmentation.
USABLE_MEMORY = 0.9
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Layout:
    """A parallel layout of a run.

    Attributes:
        config: settings of the run with this layout.
        memory: memory of each pipeline stage; empty if the layout is impossible.
        step: estimated time of a step; None if the layout is impossible.
        refusal: why the layout cannot be used, or None.
    """

    config: RunConfig
    memory: tuple[Memory, ...]
    step: StepTime | None
    refusal: str | None

    @property
    def name(self) -> str:
        """Short description of the layout: ``tp 1  pp 1  ep 8  micro-batch 2``."""
        parallel, training = self.config.parallel, self.config.training
        parts = [
            f"tp {parallel.tensor_model_parallel_size}",
            f"pp {parallel.pipeline_model_parallel_size}",
        ]
        if parallel.num_layers_per_virtual_pipeline_stage:
            parts.append(f"{parallel.num_layers_per_virtual_pipeline_stage} layers per virtual stage")
        if parallel.context_parallel_size > 1:
            parts.append(f"cp {parallel.context_parallel_size}")
        if self.config.model.num_experts:
            parts.append(f"ep {parallel.expert_model_parallel_size}")
        parts.append(f"micro-batch {training.micro_batch_size}")
        if training.recompute_granularity == "full":
            parts.append("recomputed")
        return "  ".join(parts)

    @property
    def fullest(self) -> Memory:
        """Memory of the stage that needs the most."""
        return max(self.memory, key=lambda memory: memory.total)


def judge_layout(config: RunConfig, gpu: Gpu, num_gpus: int, efficiency: float, usable: float) -> Layout:
    """Estimate the memory and the step time of a layout, or find out why it cannot be used.

    Args:
        config: settings of the run with the layout.
        gpu: kind of GPU.
        num_gpus: number of GPUs.
        efficiency: fraction of the GPU's peak at which matrix multiplications run.
        usable: fraction of the GPU's memory that tensors may take.
    """
    try:
        _check(config, num_gpus)
    except UserError as error:
        return Layout(config, (), None, str(error))
    memory = tuple(pipeline_memory(config, num_gpus))
    limit = usable * gpu.memory_gib
    needed = max(stage.total for stage in memory) / 2**30
    refusal = None if needed <= limit else f"needs {needed:.0f} GiB of memory, {limit:.0f} can be used"
    return Layout(config, memory, estimate_step(config, gpu, num_gpus, efficiency), refusal)


def _check(config: RunConfig, num_gpus: int) -> None:
    """Refuse a layout that could not be started, with the message that a start would give."""
    check_layout(config)
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    if num_gpus % ranks:
        raise UserError(f"tp x pp x cp = {ranks}: must divide {num_gpus} GPUs")
    if num_gpus // parallel.pipeline_model_parallel_size % parallel.expert_model_parallel_size:
        raise UserError("--expert-model-parallel-size: must divide the ranks of a pipeline stage")
    global_batch_size(config.training, parallel, data_parallel_size(config, num_gpus))


def recomputations(config: RunConfig) -> list[RunConfig]:
    """Return a run with each kind of activation recomputation: none, attention only, every layer."""
    none = dataclasses.replace(
        config.training, recompute_granularity=None, recompute_method=None, recompute_num_layers=None
    )
    selective = dataclasses.replace(none, recompute_granularity="selective")
    full = dataclasses.replace(none, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return [dataclasses.replace(config, training=training) for training in (none, selective, full)]


def search_layouts(
    config: RunConfig, gpu: Gpu, num_gpus: int, efficiency: float, usable: float = USABLE_MEMORY
) -> tuple[list[Layout], list[Layout]]:
    """Try all layouts of a run.

    Tensor parallelism stays within a node and is always combined with sequence parallelism; pipeline and expert
    parallelism divide layers and experts. Each layout is tried with and without full recomputation. Context parallelism
    does not change.

    Args:
        config: settings of the run, whose global batch size is kept.
        gpu: kind of GPU.
        num_gpus: number of GPUs.
        efficiency: fraction of the GPU's peak at which matrix multiplications run.
        usable: fraction of the GPU's memory that tensors may take.

    Returns:
        The layouts that fit, the fastest first, and those that do not fit.
    """
    judged = [
        judge_layout(candidate, gpu, num_gpus, efficiency, usable) for candidate in _candidates(config, gpu, num_gpus)
    ]
    fitting = sorted((layout for layout in judged if layout.refusal is None), key=_by_speed)
    return fitting, [layout for layout in judged if layout.refusal is not None]


def group_refusals(layouts: Sequence[Layout]) -> list[list[str]]:
    """Return the reasons why layouts cannot be used, grouped by kind, the most common kind first."""
    groups: dict[str, list[str]] = {}
    for layout in layouts:
        if layout.refusal:
            groups.setdefault(layout.refusal.split()[0], []).append(layout.refusal)
    return sorted(groups.values(), key=len, reverse=True)


def distinct(layouts: Sequence[Layout]) -> list[Layout]:
    """Return the first of the layouts that differ only in their micro-batch size."""
    found: dict[object, Layout] = {}
    for layout in layouts:
        found.setdefault((layout.config.parallel, layout.config.training.recompute_granularity), layout)
    return list(found.values())


def _by_speed(layout: Layout) -> tuple[float, float]:
    """Return a key that sorts faster layouts first and, among equal ones, larger micro-batches first."""
    assert layout.step
    return round(layout.step.total, 9), -micro_batch_size(layout.config)


def _candidates(config: RunConfig, gpu: Gpu, num_gpus: int) -> Iterator[RunConfig]:
    shape = shape_of(config)
    tensor = [size for size in (1, 2, 4, 8) if size <= min(gpu.per_node, num_gpus)]
    pipeline = [size for size in _divisors(shape.num_layers) if size <= num_gpus]
    experts = [size for size in _divisors(shape.num_experts or 1) if size <= num_gpus]
    none, _, full = recomputations(config)
    for tp, pp, ep, micro, start in itertools.product(tensor, pipeline, experts, MICRO_BATCHES, (none, full)):
        for per_chunk in _chunks(shape.num_layers // pp, pp):
            parallel = dataclasses.replace(
                config.parallel,
                tensor_model_parallel_size=tp,
                sequence_parallel=tp > 1,
                pipeline_model_parallel_size=pp,
                num_layers_per_virtual_pipeline_stage=per_chunk,
                expert_model_parallel_size=ep,
            )
            training = dataclasses.replace(start.training, micro_batch_size=micro)
            yield dataclasses.replace(config, parallel=parallel, training=training)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _chunks(layers_per_stage: int, pp: int) -> list[int | None]:
    """Return the numbers of layers per virtual stage to try: none, one and two."""
    if pp == 1:
        return [None]
    return [None, *(size for size in (1, 2) if size < layers_per_stage and layers_per_stage % size == 0)]
