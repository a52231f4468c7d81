"""Estimates the time of a step and its communication on a layout, to rank layouts; it does not predict kernel times.

Every matrix multiplication is assumed to run at the same fraction of the GPU's peak, whatever its size. A collective
takes its bytes divided by the bandwidth of the slowest link that it crosses, without latency. Ranks are ordered as in
Megatron-LM: tensor parallelism innermost, then context, data (which contains the expert-parallel ranks) and pipeline.

Letters: m micro-batches, P stages, v chunks per stage, D hidden, k experts per position, e bytes of a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tst.config import RunConfig
from megatron_tst.planning.memory import (
    data_parallel_size,
    gradient_bytes,
    micro_batch_size,
    num_micro_batches,
    sequences_per_step,
    shape_of,
    stage_parameters,
)
from megatron_tst.shape.flops import (
    PASSES,
    attention_flops_per_sequence,
    forward_flops_per_sequence,
    head_flops_per_sequence,
    step_flops,
)
from megatron_tst.shape.hardware import Gpu

# Transfers of the hidden states among the tensor-parallel ranks, per block (attention, MLP) and micro-batch. With
# sequence parallelism, the forward and the backward pass each gather and scatter, and the backward pass gathers its
# input once more. Without it, each pass has an all-reduce, which counts as a scatter and a gather.
SEQUENCE_PARALLEL_COLLECTIVES, TENSOR_PARALLEL_COLLECTIVES = 5, 4
# Dispatch and combine, in the forward and the backward pass.
EXPERT_EXCHANGES = 4
REDUCTIONS = ("gradient reduction", "experts' gradient reduction")
GATHERS = ("parameter all-gather", "experts' parameter all-gather")


@dataclass(frozen=True)
class StepTime:
    """The times of one rank's step, in seconds.

    Attributes:
        compute: time of matrix multiplications, including recomputation.
        bubble: time of waiting for other pipeline stages.
        exposed: time of communication that does not overlap with computation.
        volumes: bytes that a rank sends per step, by collective.
        times: time of each collective, whether it overlaps or not.
    """

    compute: float
    bubble: float
    exposed: float
    volumes: Mapping[str, float]
    times: Mapping[str, float]

    @property
    def total(self) -> float:
        """Time of the whole step."""
        return self.compute + self.bubble + self.exposed


def estimate_step(config: RunConfig, gpu: Gpu, num_gpus: int, efficiency: float) -> StepTime:
    """Estimate the time of a step.

    Args:
        config: settings that pass :func:`megatron_tst.config.check_layout`.
        gpu: kind of GPU.
        num_gpus: number of ranks.
        efficiency: fraction of the GPU's peak at which matrix multiplications run.
    """
    flops = run_step_flops(config, num_gpus)
    compute = (1 + _recomputed(config) / PASSES) * flops / (num_gpus * gpu.peak_tflops * 1e12 * efficiency)
    count, stages = num_micro_batches(config, num_gpus), config.parallel.pipeline_model_parallel_size
    volumes = communication_volumes(config, num_gpus)
    bandwidths = _bandwidths(config, gpu, num_gpus)
    times = {name: size / (1e9 * bandwidths[name]) for name, size in volumes.items()}
    # The gradient reduction overlaps with the backward pass of the last micro-batch, two thirds of its time; the
    # parameter gather overlaps with the forward pass of the first micro-batch.
    last_pass = compute / count
    hidden_reduction = last_pass * 2 / 3 if config.parallel.overlap_grad_reduce else 0.0
    hidden_gather = last_pass / 3 if config.parallel.overlap_param_gather else 0.0
    reduction, gather = (sum(times.get(name, 0.0) for name in names) for names in (REDUCTIONS, GATHERS))
    inside = sum(time for name, time in times.items() if name not in (*REDUCTIONS, *GATHERS))
    return StepTime(
        compute=compute,
        bubble=compute * (stages - 1) / (count * shape_of(config).num_virtual_stages),
        exposed=inside + max(reduction - hidden_reduction, 0.0) + max(gather - hidden_gather, 0.0),
        volumes=volumes,
        times=times,
    )


def run_step_flops(config: RunConfig, num_gpus: int) -> int:
    """Return the model FLOPs of a step over all ranks."""
    return step_flops(shape_of(config), sequences_per_step(config, num_gpus))


def calibrate(config: RunConfig, gpu: Gpu, num_gpus: int, mfu: float) -> float:
    """Return the fraction of the peak at which multiplications must run so that a layout's whole step has a given MFU.

    An MFU also counts bubbles and communication, so it is lower than this fraction. If communication alone takes longer
    than such a step, multiplications are assumed to run at the peak.
    """
    wanted = run_step_flops(config, num_gpus) / (num_gpus * gpu.peak_tflops * 1e12 * mfu)
    low, high = mfu, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        is_slow = estimate_step(config, gpu, num_gpus, middle).total > wanted
        low, high = (middle, high) if is_slow else (low, middle)
    return high


def _recomputed(config: RunConfig) -> float:
    """Return the fraction of a forward pass that is recomputed in the backward pass."""
    training, shape = config.training, shape_of(config)
    forward = forward_flops_per_sequence(shape)
    if training.recompute_granularity == "selective":
        return shape.num_layers * attention_flops_per_sequence(shape) / forward
    if training.recompute_granularity is None:
        return 0.0
    share = 1.0
    if training.recompute_method == "block":
        share = min((training.recompute_num_layers or 1) / shape.layers_per_stage, 1)
    # The output layer is never recomputed.
    return share * (forward - head_flops_per_sequence(shape)) / forward


def communication_volumes(config: RunConfig, num_gpus: int) -> dict[str, float]:
    """Return the bytes that a rank of the first stage sends per step, by collective.

    n is the number of ranks in a group, and A the number of bytes of one micro-batch's hidden states::

        tensor parallel          m layers/P * (2 blocks, or 1 with experts) * (5 with sequence parallelism, else 4) A
                                 * (n - 1) / n
        expert exchange          m layers/P * 4 (k A / tp * (n - 1) / n all-to-all, A / tp * (n - 1) gathered)
        pipeline                 m v * 2 A / (tp with sequence parallelism, else 1) * (1 - 1/P)
        gradient reduction       bytes of the gradients * (n - 1) / n, twice without a distributed optimizer
        parameter all-gather     bytes of the weights * (n - 1) / n, with a distributed optimizer
    """
    shape, training, parallel = shape_of(config), config.training, config.parallel
    tp, pp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    count, layers, width = num_micro_batches(config, num_gpus), shape.layers_per_stage, 2 if training.bf16 else 4
    positions = micro_batch_size(config) * shape.seq_length // parallel.context_parallel_size
    hidden = positions * shape.hidden_size * width
    blocks = 1 if shape.num_experts else 2
    is_split = parallel.sequence_parallel
    passes = SEQUENCE_PARALLEL_COLLECTIVES if is_split else TENSOR_PARALLEL_COLLECTIVES
    volumes = {
        "tensor parallel": count * layers * blocks * passes * hidden * _others(tp),
        "pipeline": count * shape.num_virtual_stages * 2 * hidden / (tp if is_split else 1) * _others(pp),
    }
    if shape.num_experts:
        is_gathered = config.model.moe_token_dispatcher_type == "allgather"
        exchanged = ep - 1 if is_gathered else shape.moe_router_topk * _others(ep)
        volumes["expert exchange"] = count * layers * EXPERT_EXCHANGES * hidden / tp * exchanged
    replicas = data_parallel_size(config, num_gpus) * parallel.context_parallel_size
    is_sharded = config.optimizer.use_distributed_optimizer
    groups = zip(stage_parameters(config, 0), (replicas, num_gpus // (pp * ep)), REDUCTIONS, GATHERS, strict=True)
    for parameters, group, reduction, gather in groups:
        volumes[reduction] = gradient_bytes(training) * parameters * _others(group) * (1 if is_sharded else 2)
        volumes[gather] = width * parameters * _others(group) if is_sharded else 0
    return {name: size for name, size in volumes.items() if size}


def _bandwidths(config: RunConfig, gpu: Gpu, num_gpus: int) -> dict[str, float]:
    """Return the bandwidth of each collective, in 1e9 bytes per second and rank.

    A group that spans nodes uses the network cards of all its members in a node. An all-to-all sends equally much to
    every member, so only the part for other nodes crosses the network.
    """
    parallel = config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    stage = num_gpus // parallel.pipeline_model_parallel_size

    def replicas(stride: int) -> float:
        """Return the bandwidth of a group that spans a whole stage, with members ``stride`` ranks apart."""
        if stage <= gpu.per_node:
            return gpu.nvlink_gb_per_s
        return min(gpu.network_gb_per_s * max(gpu.per_node // stride, 1), gpu.nvlink_gb_per_s)

    outside = max(1 - gpu.per_node / ep, 0.0)
    shared, experts = replicas(tp), replicas(ep)
    return {
        "tensor parallel": gpu.nvlink_gb_per_s if tp <= gpu.per_node else gpu.network_gb_per_s,
        "pipeline": gpu.nvlink_gb_per_s if num_gpus <= gpu.per_node else gpu.network_gb_per_s,
        "expert exchange": 1 / (outside / gpu.network_gb_per_s + (1 - outside) / gpu.nvlink_gb_per_s),
        **dict(zip(REDUCTIONS, (shared, experts), strict=True)),
        **dict(zip(GATHERS, (shared, experts), strict=True)),
    }


def _others(group: int) -> float:
    """Return the fraction of a group's data that is on the other ranks."""
    return (group - 1) / group
