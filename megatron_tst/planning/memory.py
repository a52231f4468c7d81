"""What a card holds during training, by part, for each rank of the pipeline.

A number has 2 bytes in bfloat16, else 4. Activations are counted per position, from what each module keeps for its
backward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from megatron_tst.config import RunConfig, TrainingSettings, require
from megatron_tst.shape import ModelShape, resolve_shape, virtual_stages
from megatron_tst.shape.parameters import parameter_parts

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds at its fullest moment, by part.

    Attributes:
        weights: in the dtype that is computed in.
        gradients: the buffers they are accumulated in.
        optimizer: main weights and moments.
        activations: kept from forward to backward passes, of all micro-batches under way.
        logits_and_loss: the logits of one micro-batch, whose memory becomes their gradient's; gone before the first
            layer's backward pass.
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
        """All parts that are there together, in bytes: of the last two, the larger."""
        lasting = self.weights + self.gradients + self.optimizer + self.activations
        return lasting + max(self.logits_and_loss, self.backward)


def pipeline_memory(config: RunConfig, num_gpus: int, fused: bool = True) -> list[Memory]:
    """Return what one rank of each pipeline stage holds, first stage first.

    Args:
        config: shape, layout, batch and recomputation; :func:`megatron_tst.config.check_layout` holds.
        num_gpus: ranks in all, a multiple of tp x pp x cp.
        fused: whether layers are Transformer Engine's; else megatron-core's with torch's norms, as on a CPU.
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
    logits = shape.padded_vocab_size // tp * width if is_last else 0
    head = _head_activation(shape, width, tp if parallel.sequence_parallel else 1, fused) if is_last else 0
    return Memory(
        weights=(shared + experts) * width,
        gradients=(shared + experts) * gradient_bytes(training),
        optimizer=_optimizer_bytes(config, num_gpus, shared, experts),
        activations=int(positions * (kept * under_way + head)),
        logits_and_loss=positions * logits,
        backward=int(positions * passing),
    )


def stage_parameters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Return the parameters that one rank of a pipeline stage holds: those outside experts, and its experts'."""
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
        # A tied output weight is a copy of the embedding where they lie on different stages.
        shared += parts.table // tp if not (shape.is_tied and is_first) else 0
    return shared, layers * parts.layer_experts // parallel.expert_model_parallel_size


def gradient_bytes(training: TrainingSettings) -> int:
    """Return the bytes of one gradient in the buffers that are reduced."""
    return 2 if training.bf16 and not training.accumulate_allreduce_grads_in_fp32 else FLOAT32_BYTES


def _optimizer_bytes(config: RunConfig, num_gpus: int, shared: int, experts: int) -> int:
    """Return two moments, and float32 main weights beside bfloat16 ones, sharded where the optimizer is distributed."""
    parallel = config.parallel
    each = FLOAT32_BYTES * (3 if config.training.bf16 else 2)
    if not config.optimizer.use_distributed_optimizer:
        return (shared + experts) * each
    per_stage = num_gpus // parallel.pipeline_model_parallel_size
    owners = per_stage // parallel.tensor_model_parallel_size
    expert_owners = per_stage // parallel.expert_model_parallel_size
    return each * shared // owners + each * experts // expert_owners


def micro_batches_under_way(config: RunConfig, num_gpus: int, stage: int) -> float:
    """Return the micro-batches whose activations a stage holds at once, in its own layers' worth.

    One forward, one backward: stage p of P holds P - p of them; interleaved with v chunks, warm-up runs
    2 (P - p - 1) + (v - 1) P chunks ahead.
    """
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    count = num_micro_batches(config, num_gpus)
    chunks = virtual_stages(require("--num-layers", config.model.num_layers), parallel) or 1
    if chunks == 1:
        return min(count, pp - stage)
    return min(count * chunks, 2 * (pp - stage - 1) + (chunks - 1) * pp + 1) / chunks


def shape_of(config: RunConfig) -> ModelShape:
    """Return the sizes of a run's model on its layout."""
    return resolve_shape(config.model, parallel=config.parallel)


def micro_batch_size(config: RunConfig) -> int:
    """Return the sequences of one forward pass.

    Raises:
        UserError: if they are not given.
    """
    return require("--micro-batch-size", config.training.micro_batch_size)


def num_micro_batches(config: RunConfig, num_gpus: int) -> int:
    """Return the micro-batches that one rank runs per step."""
    per_pass = micro_batch_size(config) * data_parallel_size(config, num_gpus)
    return max(sequences_per_step(config, num_gpus) // per_pass, 1)


def sequences_per_step(config: RunConfig, num_gpus: int) -> int:
    """Return the global batch: as given, or one micro-batch per replica of the model."""
    return config.training.global_batch_size or micro_batch_size(config) * data_parallel_size(config, num_gpus)


def data_parallel_size(config: RunConfig, num_gpus: int) -> int:
    """Return the replicas of the model's dense part."""
    parallel = config.parallel
    return num_gpus // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )


def stage_activations(
    shape: ModelShape, training: TrainingSettings, sp: int, tp: int, fused: bool
) -> tuple[float, float]:
    """Return the bytes per position that a stage keeps per micro-batch, and that one layer's backward pass adds.

    Full recomputation keeps the input of each recomputed chunk, and makes the chunk's activations again when it is
    walked back.

    Args:
        shape: the sizes of the model on its layout.
        training: precision and recomputation.
        sp: ranks that share what lies between the matrices: tp with sequence parallelism, else 1.
        tp: ranks that share the matrices.
        fused: whether layers are Transformer Engine's.
    """
    width, layers = _number_bytes(training), shape.layers_per_stage
    layer = sum(layer_activations(shape, width, sp, tp, fused).values())
    gradients = _gradients_of_a_layer(shape, width, sp, tp)
    if training.recompute_granularity != "full":
        return layers * layer, gradients
    chunk_input = width * shape.hidden_size / sp
    chunk = min(training.recompute_num_layers or 1, layers)
    if training.recompute_method == "block":
        # Layers that are not recomputed are walked back first; what they kept is gone before others are made again.
        recomputed = layer if chunk == layers else 0
        return chunk * chunk_input + (layers - chunk) * layer, recomputed + gradients
    return -(-layers // chunk) * chunk_input, chunk * layer + gradients


def layer_activations(shape: ModelShape, width: int, sp: int, tp: int, fused: bool) -> dict[str, float]:
    """Return what one layer keeps for its backward pass, in bytes per position, by part.

    Nothing is kept twice: the output of attention is the input of its projection. Values keep the whole of the mixed
    projection they were cut from. Dropout is not counted.

    Args:
        shape: the sizes of the model.
        width: bytes of a number.
        sp: ranks that share what lies between the matrices.
        tp: ranks that share the matrices.
        fused: whether layers are Transformer Engine's; torch's norms keep two float32 copies instead of their input,
            and its gated unit keeps each factor.
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
    """Return what norms of queries and keys keep: their inputs, or in float32 their inputs and outputs."""
    if fused:
        return width * (queries + keys) + FLOAT32_BYTES * 2 * heads
    # Float32 keys are a view of the mixed projection, which is kept anyway.
    copies = queries + (keys if width < FLOAT32_BYTES else 0)
    return FLOAT32_BYTES * (copies + queries + keys)


def _inner_copies(shape: ModelShape, fused: bool) -> int:
    """Return the F-wide numbers that an MLP keeps: a gated unit has two inputs and one output."""
    if not shape.is_gated:
        return 2
    # Unfused: the two inputs, both factors of the product and its result, which an expert multiplies by its weight.
    return 3 if fused else (6 if shape.num_experts else 5)


def _head_activation(shape: ModelShape, width: int, sp: int, fused: bool) -> float:
    """Return what the last norm and the output layer keep, in bytes per position."""
    norm = width * shape.hidden_size if fused else 2 * FLOAT32_BYTES * shape.hidden_size
    return (norm + width * shape.hidden_size) / sp


def _gradients_of_a_layer(shape: ModelShape, width: int, sp: int, tp: int) -> float:
    """Return the gradients that are alive together when a layer's backward pass begins: of its output and the MLP's.

    Later ones take the place of activations that are done with.
    """
    inner = shape.inner_width
    wide = inner * shape.moe_router_topk / sp if shape.num_experts else inner / tp
    return width * (wide + shape.hidden_size / sp)


def _number_bytes(training: TrainingSettings) -> int:
    return 2 if training.bf16 else FLOAT32_BYTES


def describe_parts(memories: Sequence[Memory]) -> Iterator[tuple[str, list[float]]]:
    """Yield each part's name and its GiB on every stage, the total last."""
    for name in (*(part.name for part in fields(Memory)), "total"):
        yield name, [getattr(memory, name) / 2**30 for memory in memories]
