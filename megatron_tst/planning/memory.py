"""Estimates the GPU memory of a training run by part, for each pipeline stage.

A number has 2 bytes in bfloat16 and 4 bytes otherwise. Activations are counted per position, as the sum of the tensors
that each module keeps for its backward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from megatron_tst.config import RunConfig, TrainingSettings, require
from megatron_tst.shape import ModelShape, resolve_shape, virtual_stages
from megatron_tst.shape.loss_chunks import chunk_rows
from megatron_tst.shape.parameters import parameter_parts

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank in bytes, by part.

    Attributes:
        weights: weights in the compute dtype.
        gradients: buffers in which gradients are accumulated.
        optimizer: main weights and moments.
        activations: kept from forward to backward passes, of all micro-batches under way.
        logits_and_loss: the logits of one micro-batch, whose memory becomes their gradient's, or with the linear loss
            a chunk of them and both its gradients; gone before the first layer's backward pass.
        backward: what the backward pass of one layer makes: gradients, and activations that are recomputed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits_and_loss: int
    backward: int

    @property
    def total(self) -> int:
        """Sum of the parts that exist at the same time, in bytes; of the last two, only the larger one counts."""
        lasting = self.weights + self.gradients + self.optimizer + self.activations
        return lasting + max(self.logits_and_loss, self.backward)


def pipeline_memory(config: RunConfig, num_gpus: int, fused: bool = True) -> list[Memory]:
    """Return the memory of one rank of each pipeline stage, first stage first.

    Args:
        config: settings that pass :func:`megatron_tst.config.check_layout`.
        num_gpus: number of ranks, a multiple of tp x pp x cp.
        fused: whether layers are those of Transformer Engine; otherwise they are megatron-core's with torch's norms, as
            on a CPU.
    """
    stages = config.parallel.pipeline_model_parallel_size
    return [_stage_memory(config, num_gpus, stage, fused) for stage in range(stages)]


def _stage_memory(config: RunConfig, num_gpus: int, stage: int, fused: bool) -> Memory:
    shape, training, parallel = shape_of(config), config.training, config.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    shared, experts = stage_parameters(config, stage)
    positions = micro_batch_size(config) * shape.seq_length // cp
    width = _number_bytes(training)
    under_way = micro_batches_under_way(config, num_gpus, stage)
    kept, passing = stage_activations(shape, training, tp if parallel.sequence_parallel else 1, tp, fused)
    is_last = stage == pp - 1
    head = _head_activation(shape, width, tp if parallel.sequence_parallel else 1, fused) if is_last else 0
    return Memory(
        weights=(shared + experts) * width,
        gradients=(shared + experts) * gradient_bytes(training),
        optimizer=_optimizer_bytes(config, num_gpus, shared, experts),
        activations=int(positions * (kept * under_way + head)),
        logits_and_loss=_loss_bytes(config, positions) if is_last else 0,
        backward=int(positions * passing),
    )


def _loss_bytes(config: RunConfig, positions: int) -> int:
    """Return what the last stage's loss makes of a micro-batch: logits, or a chunk of them and both gradients."""
    shape, width = shape_of(config), _number_bytes(config.training)
    columns = shape.padded_vocab_size // config.parallel.tensor_model_parallel_size
    if config.training.cross_entropy_fusion_impl != "linear":
        return positions * columns * width
    chunk = min(chunk_rows(positions), positions) * columns * width
    # The weight's gradient adds up in float32; once the chunks are gone it is rounded to a bfloat16 copy.
    rounded = columns * shape.hidden_size * width if width < FLOAT32_BYTES else 0
    return max(chunk, rounded) + columns * shape.hidden_size * FLOAT32_BYTES + positions * shape.hidden_size * width


def stage_parameters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Return the number of parameters of one rank of a pipeline stage, outside experts and in experts."""
    shape, parallel = shape_of(config), config.parallel
    parts = parameter_parts(shape)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = shape.layers_per_stage
    shared = layers * (parts.layer_matrices // tp + parts.layer_copied)
    is_first, is_last = stage == 0, stage == pp - 1
    if is_first:
        shared += parts.table // tp + parts.positions
    if is_last:
        shared += parts.last_norm
        # A tied output weight is a copy of the embedding if the two are on different stages.
        shared += parts.table // tp if not (shape.is_tied and is_first) else 0
    return shared, layers * parts.layer_experts // parallel.expert_model_parallel_size


def gradient_bytes(training: TrainingSettings) -> int:
    """Return the number of bytes of one gradient in the buffers that are reduced."""
    return 2 if training.bf16 and not training.accumulate_allreduce_grads_in_fp32 else FLOAT32_BYTES


def _optimizer_bytes(config: RunConfig, num_gpus: int, shared: int, experts: int) -> int:
    """Return the bytes of both moments and, with bfloat16, of the float32 main weights.

    A distributed optimizer shards them over the data-parallel ranks.
    """
    parallel = config.parallel
    each = FLOAT32_BYTES * (3 if config.training.bf16 else 2)
    if not config.optimizer.use_distributed_optimizer:
        return (shared + experts) * each
    per_stage = num_gpus // parallel.pipeline_model_parallel_size
    owners = per_stage // parallel.tensor_model_parallel_size
    expert_owners = per_stage // parallel.expert_model_parallel_size
    return each * shared // owners + each * experts // expert_owners


def micro_batches_under_way(config: RunConfig, num_gpus: int, stage: int) -> float:
    """Return the number of micro-batches in flight, whose activations a stage holds at the same time.

    In the 1F1B schedule, stage p of P holds P - p of them. In the interleaved schedule with v chunks, warm-up runs
    2 (P - p - 1) + (v - 1) P chunks ahead; the result counts v chunks as one micro-batch.
    """
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    count = num_micro_batches(config, num_gpus)
    chunks = virtual_stages(require("--num-layers", config.model.num_layers), parallel) or 1
    if chunks == 1:
        return min(count, pp - stage)
    return min(count * chunks, 2 * (pp - stage - 1) + (chunks - 1) * pp + 1) / chunks


def shape_of(config: RunConfig) -> ModelShape:
    """Return the resolved sizes of a run's model with its layout."""
    return resolve_shape(config.model, parallel=config.parallel)


def micro_batch_size(config: RunConfig) -> int:
    """Return the number of sequences of one forward pass.

    Raises:
        UserError: if ``--micro-batch-size`` is not given.
    """
    return require("--micro-batch-size", config.training.micro_batch_size)


def num_micro_batches(config: RunConfig, num_gpus: int) -> int:
    """Return the number of micro-batches that one rank runs per step."""
    per_pass = micro_batch_size(config) * data_parallel_size(config, num_gpus)
    return max(sequences_per_step(config, num_gpus) // per_pass, 1)


def sequences_per_step(config: RunConfig, num_gpus: int) -> int:
    """Return the global batch size: the configured one, or one micro-batch per replica of the model."""
    return config.training.global_batch_size or micro_batch_size(config) * data_parallel_size(config, num_gpus)


def data_parallel_size(config: RunConfig, num_gpus: int) -> int:
    """Return the data-parallel size, which is the number of replicas of the model's dense part."""
    parallel = config.parallel
    return num_gpus // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )


def stage_activations(
    shape: ModelShape, training: TrainingSettings, sp: int, tp: int, fused: bool
) -> tuple[float, float]:
    """Return the bytes per position that a stage keeps per micro-batch, and those that one layer's backward pass adds.

    Full recomputation keeps the input of each recomputed chunk, and computes the chunk's activations again in its
    backward pass.

    Args:
        shape: sizes of the model with its layout.
        training: precision and recomputation.
        sp: number of ranks that shard the activations between matrices: tp with sequence parallelism, otherwise 1.
        tp: number of ranks that shard the matrices.
        fused: whether layers are those of Transformer Engine.
    """
    width, layers = _number_bytes(training), shape.layers_per_stage
    layer = sum(layer_activations(shape, width, sp, tp, fused).values())
    gradients = _gradients_of_a_layer(shape, width, sp, tp)
    if training.recompute_granularity != "full":
        return layers * layer, gradients
    chunk_input = width * shape.hidden_size / sp
    chunk = min(training.recompute_num_layers or 1, layers)
    if training.recompute_method == "block":
        # The backward pass begins with the layers that are not recomputed, and releases their activations before the
        # other layers are recomputed.
        recomputed = layer if chunk == layers else 0
        return chunk * chunk_input + (layers - chunk) * layer, recomputed + gradients
    return -(-layers // chunk) * chunk_input, chunk * layer + gradients


def layer_activations(shape: ModelShape, width: int, sp: int, tp: int, fused: bool) -> dict[str, float]:
    """Return the activations that one layer keeps for its backward pass, in bytes per position, by part.

    Shared tensors count once: the output of attention is also the input of its projection. The values are a view of the
    mixed projection, so all of it is kept. Dropout is not counted.

    Args:
        shape: sizes of the model.
        width: bytes of a number.
        sp: number of ranks that shard the activations between matrices.
        tp: number of ranks that shard the matrices.
        fused: whether layers are those of Transformer Engine; torch's norms keep two float32 copies instead of their
            input, and its gated unit keeps each factor.
    """
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    queries, keys = shape.query_width, shape.key_width
    norm = width * hidden + FLOAT32_BYTES if fused else 2 * FLOAT32_BYTES * hidden + FLOAT32_BYTES
    parts = {
        "norms": 2 * (norm + width * hidden) / sp,
        "mixed projection": width * shape.query_key_value_width / tp,
        "rotated queries and keys": width * (queries + keys) / tp if shape.has_rope else 0.0,
        "attention": (width * queries + FLOAT32_BYTES * heads) / tp,
    }
    if shape.has_qk_norms:
        parts["norms of queries and keys"] = _head_norms(queries, keys, heads, width, fused) / tp
    inner = shape.inner_width * _inner_copies(shape, fused)
    if shape.num_experts:
        parts["experts"] = shape.moe_router_topk * width * (hidden + inner) / sp
        parts["router"] = (9 * shape.num_experts + 28 * shape.moe_router_topk) / sp
    else:
        parts["MLP"] = width * inner / tp
    return parts


def _head_norms(queries: int, keys: int, heads: int, width: int, fused: bool) -> float:
    """Return the bytes that norms of queries and keys keep: their inputs or, unfused, float32 inputs and outputs."""
    if fused:
        return width * (queries + keys) + FLOAT32_BYTES * 2 * heads
    # Keys in float32 are a view of the mixed projection, which is kept anyway.
    copies = queries + (keys if width < FLOAT32_BYTES else 0)
    return FLOAT32_BYTES * (copies + queries + keys)


def _inner_copies(shape: ModelShape, fused: bool) -> int:
    """Return the number of F-wide tensors that an MLP keeps: a gated unit has two inputs and one output."""
    if not shape.is_gated:
        return 2
    # Unfused, it keeps two inputs, both factors and the product, which an expert multiplies by its router weight.
    return 3 if fused else (6 if shape.num_experts else 5)


def _head_activation(shape: ModelShape, width: int, sp: int, fused: bool) -> float:
    """Return the activations that the last norm and the output layer keep, in bytes per position."""
    norm = width * shape.hidden_size if fused else 2 * FLOAT32_BYTES * shape.hidden_size
    return (norm + width * shape.hidden_size) / sp


def _gradients_of_a_layer(shape: ModelShape, width: int, sp: int, tp: int) -> float:
    """Return the gradients at the start of a layer's backward pass: those of its output and of the MLP's inner tensor.

    Later gradients reuse the memory of activations that are no longer needed.
    """
    inner = shape.inner_width
    wide = inner * shape.moe_router_topk / sp if shape.num_experts else inner / tp
    return width * (wide + shape.hidden_size / sp)


def _number_bytes(training: TrainingSettings) -> int:
    return 2 if training.bf16 else FLOAT32_BYTES


def describe_parts(memories: Sequence[Memory]) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each part with its GiB on every stage, and the total last."""
    for name in (*(part.name for part in fields(Memory)), "total"):
        yield name, [getattr(memory, name) / 2**30 for memory in memories]
