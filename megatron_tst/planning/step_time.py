"""How long a step takes on a layout, and what it sends: arithmetic to rank layouts by, not a prediction of kernels.

Every matrix multiplication is taken to run at one share of the card's peak, whatever its size. A collective takes its
bytes over the bandwidth of the slowest link it crosses, latency left out. Ranks are laid out as Megatron-LM does it:
tensor parallelism innermost, then context, data (which holds the experts' ranks) and the pipeline.

Letters: m micro-batches, P stages, v chunks per stage, D hidden, k experts per position, e bytes of a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tst.config import RunConfig, padded_vocab_size
from megatron_tst.planning.hardware import Gpu
from megatron_tst.planning.memory import (
    data_parallel_size,
    gradient_bytes,
    num_micro_batches,
    stage_parameters,
    virtual_chunks,
)
from megatron_tst.telemetry.flops import PASSES, forward_flops_per_sequence

# Forward and backward pass each gather and scatter once per matrix pair; the backward pass gathers its input again.
TENSOR_COLLECTIVES_PER_BLOCK = 5
# Dispatch and combine, in both passes.
EXPERT_EXCHANGES = 4


@dataclass(frozen=True)
class StepTime:
    """A step of one rank, in seconds.

    Attributes:
        compute: multiplications, what is recomputed included.
        bubble: waiting for other stages.
        exposed: communication that nothing hides.
        volumes: bytes that a rank sends per step, by collective.
        times: seconds that these take, hidden or not.
    """

    compute: float
    bubble: float
    exposed: float
    volumes: Mapping[str, float]
    times: Mapping[str, float]

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.bubble + self.exposed


def estimate_step(config: RunConfig, gpu: Gpu, num_gpus: int, efficiency: float) -> StepTime:
    """Estimate a step.

    Args:
        config: shape, layout, batch and recomputation; :func:`megatron_tst.config.check_layout` holds.
        gpu: the card.
        num_gpus: ranks in all.
        efficiency: share of the card's peak that multiplications run at.
    """
    assert config.training.global_batch_size
    flops = PASSES * config.training.global_batch_size * forward_flops_per_sequence(config.model, _vocabulary(config))
    passes = (PASSES + (1 if config.training.recompute_granularity == "full" else 0)) / PASSES
    compute = passes * flops / (num_gpus * gpu.peak_tflops * 1e12 * efficiency)
    count, stages = num_micro_batches(config, num_gpus), config.parallel.pipeline_model_parallel_size
    volumes = communication_volumes(config, num_gpus)
    times = {name: size / (1e9 * _bandwidths(config, gpu, num_gpus)[name]) for name, size in volumes.items()}
    # Gradients are reduced while the last micro-batch's backward pass, two thirds of it, runs; parameters are gathered
    # while the first one's forward pass does.
    last_pass = compute / count
    hidden = {
        "gradient reduce-scatter": last_pass * 2 / 3 if config.parallel.overlap_grad_reduce else 0.0,
        "parameter all-gather": last_pass / 3 if config.parallel.overlap_param_gather else 0.0,
    }
    exposed = sum(max(time - hidden.get(name, 0.0), 0.0) for name, time in times.items())
    return StepTime(
        compute=compute,
        bubble=compute * (stages - 1) / (count * virtual_chunks(config)),
        exposed=exposed,
        volumes=volumes,
        times=times,
    )


def communication_volumes(config: RunConfig, num_gpus: int) -> dict[str, float]:
    """Return the bytes that a rank of the widest stage sends per step, by collective.

    With n ranks in a group and A bytes of one micro-batch's hidden states on one rank::

        tensor parallel          m layers/P * (2 blocks, 1 with experts) * 5 A (n - 1) / n
        expert all-to-all        m layers/P * 4 k A / tp * (n - 1) / n
        pipeline                 m v * 2 A (1 - 1/P)
        gradient reduce-scatter  bytes of the gradients * (n - 1) / n
        parameter all-gather     bytes of the weights * (n - 1) / n
    """
    model, training, parallel = config.model, config.training, config.parallel
    assert model.num_layers and model.hidden_size and model.seq_length and training.micro_batch_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, width = parallel.expert_model_parallel_size, 2 if training.bf16 else 4
    count, layers = num_micro_batches(config, num_gpus), model.num_layers // pp
    positions = training.micro_batch_size * model.seq_length // parallel.context_parallel_size
    hidden = positions * model.hidden_size * width
    blocks = 1 if model.num_experts else 2
    volumes = {
        "tensor parallel": count * layers * blocks * TENSOR_COLLECTIVES_PER_BLOCK * hidden * _others(tp),
        "pipeline": count * virtual_chunks(config) * 2 * hidden / tp * _others(pp),
    }
    if model.num_experts:
        routed = model.moe_router_topk * hidden / tp
        volumes["expert all-to-all"] = count * layers * EXPERT_EXCHANGES * routed * _others(ep)
    replicas = data_parallel_size(config, num_gpus) * parallel.context_parallel_size
    expert_replicas = num_gpus // (pp * ep)
    shared, experts = stage_parameters(config, 0)
    spread = shared * _others(replicas) + experts * _others(expert_replicas)
    volumes["gradient reduce-scatter"] = gradient_bytes(training) * spread
    volumes["parameter all-gather"] = width * spread
    return {name: size for name, size in volumes.items() if size}


def _bandwidths(config: RunConfig, gpu: Gpu, num_gpus: int) -> dict[str, float]:
    """Return what each collective runs at, 1e9 bytes per second and rank.

    A group that spans nodes goes through the network cards of all its members in a node. An all-to-all sends to every
    member alike, so only the part for other nodes crosses the network.
    """
    parallel = config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    model_group = tp * cp
    stage = num_gpus // parallel.pipeline_model_parallel_size
    per_node = max(gpu.per_node // model_group, 1)
    data = gpu.nvlink_gb_per_s if stage <= gpu.per_node else gpu.network_gb_per_s * per_node
    tensor = gpu.nvlink_gb_per_s if tp <= gpu.per_node else gpu.network_gb_per_s
    experts = parallel.expert_model_parallel_size
    outside = max(1 - gpu.per_node / experts, 0.0)
    exchange = 1 / (outside / gpu.network_gb_per_s + (1 - outside) / gpu.nvlink_gb_per_s)
    return {
        "tensor parallel": tensor,
        "pipeline": gpu.nvlink_gb_per_s if num_gpus <= gpu.per_node else gpu.network_gb_per_s,
        "expert all-to-all": exchange,
        "gradient reduce-scatter": min(data, gpu.nvlink_gb_per_s),
        "parameter all-gather": min(data, gpu.nvlink_gb_per_s),
    }


def _others(group: int) -> float:
    """Return the share of a group's data that lies on its other ranks."""
    return (group - 1) / group


def _vocabulary(config: RunConfig) -> int:
    model = config.model
    assert model.vocab_size
    return padded_vocab_size(
        model.vocab_size, model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
