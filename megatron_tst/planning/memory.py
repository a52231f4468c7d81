"""What a card holds during training, by part, for each rank of the pipeline.

A number has 2 bytes in bfloat16, else 4. Activations are counted per position, from what each module keeps for its
backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_tst.config import ModelSettings, RunConfig, TrainingSettings, padded_vocab_size
from megatron_tst.shape.loss_chunks import chunk_rows
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
    model, training, parallel = config.model, config.training, config.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    assert model.num_layers and model.hidden_size and model.seq_length and training.micro_batch_size
    shared, experts = stage_parameters(config, stage)
    layers = model.num_layers // pp
    positions = training.micro_batch_size * model.seq_length // cp
    width = _number_bytes(training)
    under_way = micro_batches_under_way(config, num_gpus, stage)
    kept, passing = stage_activations(model, training, layers, tp if parallel.sequence_parallel else 1, tp, fused)
    is_last = stage == pp - 1
    head = _head_activation(model, width, tp if parallel.sequence_parallel else 1, fused) if is_last else 0
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
    width, hidden = _number_bytes(config.training), config.model.hidden_size
    columns = _vocabulary(config) // config.parallel.tensor_model_parallel_size
    if config.training.cross_entropy_fusion_impl != "linear":
        return positions * columns * width
    assert hidden
    chunk = min(chunk_rows(positions), positions) * columns * width
    # The weight's gradient adds up in float32; once the chunks are gone it is rounded to a bfloat16 copy.
    rounded = columns * hidden * width if width < FLOAT32_BYTES else 0
    return max(chunk, rounded) + columns * hidden * FLOAT32_BYTES + positions * hidden * width


def stage_parameters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Return the parameters that one rank of a pipeline stage holds: those outside experts, and its experts'."""
    model, parallel = config.model, config.parallel
    assert model.num_layers
    parts = parameter_parts(model, _vocabulary(config))
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = model.num_layers // pp
    shared = layers * (parts.layer_matrices // tp + parts.layer_copied)
    is_first, is_last = stage == 0, stage == pp - 1
    if is_first:
        shared += parts.table // tp + parts.positions
    if is_last:
        shared += parts.last_norm
        # A tied output weight is a copy of the embedding where they lie on different stages.
        shared += parts.table // tp if model.untie_embeddings_and_output_weights or not is_first else 0
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
    chunks = virtual_chunks(config)
    if chunks == 1:
        return min(count, pp - stage)
    return min(count * chunks, 2 * (pp - stage - 1) + (chunks - 1) * pp + 1) / chunks


def virtual_chunks(config: RunConfig) -> int:
    """Return the chunks of layers that each stage holds: 1 without interleaving."""
    per_chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    assert config.model.num_layers
    if per_chunk is None:
        return 1
    return config.model.num_layers // config.parallel.pipeline_model_parallel_size // per_chunk


def num_micro_batches(config: RunConfig, num_gpus: int) -> int:
    """Return the micro-batches that one rank runs per step."""
    training = config.training
    assert training.micro_batch_size
    per_pass = training.micro_batch_size * data_parallel_size(config, num_gpus)
    return max((training.global_batch_size or per_pass) // per_pass, 1)


def data_parallel_size(config: RunConfig, num_gpus: int) -> int:
    """Return the replicas of the model's dense part."""
    parallel = config.parallel
    return num_gpus // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )


def stage_activations(
    model: ModelSettings, training: TrainingSettings, layers: int, sp: int, tp: int, fused: bool
) -> tuple[float, float]:
    """Return the bytes per position that a stage keeps per micro-batch, and that one layer's backward pass adds.

    Full recomputation keeps the input of each recomputed chunk, and makes the chunk's activations again when it is
    walked back.

    Args:
        model: the shape.
        training: precision and recomputation.
        layers: of the stage.
        sp: ranks that share what lies between the matrices: tp with sequence parallelism, else 1.
        tp: ranks that share the matrices.
        fused: whether layers are Transformer Engine's.
    """
    assert model.hidden_size
    width = _number_bytes(training)
    layer = sum(layer_activations(model, width, sp, tp, fused).values())
    gradients = _gradients_of_a_layer(model, width, sp, tp)
    if training.recompute_granularity != "full":
        return layers * layer, gradients
    assert training.recompute_num_layers
    chunk_input = width * model.hidden_size / sp
    chunk = min(training.recompute_num_layers, layers)
    if training.recompute_method == "block":
        # Layers that are not recomputed are walked back first; what they kept is gone before others are made again.
        recomputed = layer if chunk == layers else 0
        return chunk * chunk_input + (layers - chunk) * layer, recomputed + gradients
    return -(-layers // chunk) * chunk_input, chunk * layer + gradients


def layer_activations(model: ModelSettings, width: int, sp: int, tp: int, fused: bool) -> dict[str, float]:
    """Return what one layer keeps for its backward pass, in bytes per position, by part.

    Nothing is kept twice: the output of attention is the input of its projection. Values keep the whole of the mixed
    projection they were cut from. Dropout is not counted.

    Args:
        model: the shape.
        width: bytes of a number.
        sp: ranks that share what lies between the matrices.
        tp: ranks that share the matrices.
        fused: whether layers are Transformer Engine's; torch's norms keep two float32 copies instead of their input,
            and its gated unit keeps each factor.
    """
    assert model.hidden_size and model.num_attention_heads
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_width = model.kv_channels or hidden // heads
    queries = heads * head_width
    keys = head_width * (model.num_query_groups if model.group_query_attention else heads)
    norm = width * hidden + FLOAT32_BYTES if fused else 2 * FLOAT32_BYTES * hidden + FLOAT32_BYTES
    parts = {
        "norms": 2 * (norm + width * hidden) / sp,
        "mixed projection": width * (queries + 2 * keys) / tp,
        "rotated queries and keys": width * (queries + keys) / tp if model.position_embedding_type == "rope" else 0.0,
        "attention": (width * queries + FLOAT32_BYTES * heads) / tp,
    }
    if model.qk_layernorm:
        parts["norms of queries and keys"] = _head_norms(queries, keys, heads, width, fused) / tp
    if model.num_experts:
        inner = model.moe_ffn_hidden_size or model.ffn_hidden_size or 4 * hidden
        routed = model.moe_router_topk * width * (hidden + inner * _inner_copies(model, fused, weighted=True))
        parts["experts"] = routed / sp
        parts["router"] = (9 * model.num_experts + 28 * model.moe_router_topk) / sp
    else:
        inner = model.ffn_hidden_size or 4 * hidden
        parts["MLP"] = width * inner * _inner_copies(model, fused, weighted=False) / tp
    return parts


def _head_norms(queries: int, keys: int, heads: int, width: int, fused: bool) -> float:
    """Return what norms of queries and keys keep: their inputs, or in float32 their inputs and outputs."""
    if fused:
        return width * (queries + keys) + FLOAT32_BYTES * 2 * heads
    # Float32 keys are a view of the mixed projection, which is kept anyway.
    copies = queries + (keys if width < FLOAT32_BYTES else 0)
    return FLOAT32_BYTES * (copies + queries + keys)


def _inner_copies(model: ModelSettings, fused: bool, weighted: bool) -> int:
    """Return the F-wide numbers that an MLP keeps: a gated unit has two inputs and one output."""
    if not model.swiglu:
        return 2
    # Unfused: the two inputs, both factors of the product and its result, which an expert multiplies by its weight.
    return 3 if fused else (6 if weighted else 5)


def _head_activation(model: ModelSettings, width: int, sp: int, fused: bool) -> float:
    """Return what the last norm and the output layer keep, in bytes per position."""
    assert model.hidden_size
    norm = width * model.hidden_size if fused else 2 * FLOAT32_BYTES * model.hidden_size
    return (norm + width * model.hidden_size) / sp


def _gradients_of_a_layer(model: ModelSettings, width: int, sp: int, tp: int) -> float:
    """Return the gradients that are alive together when a layer's backward pass begins: of its output and the MLP's.

    Later ones take the place of activations that are done with.
    """
    assert model.hidden_size
    inner = (model.moe_ffn_hidden_size if model.num_experts else None) or model.ffn_hidden_size or 4 * model.hidden_size
    wide = inner * model.moe_router_topk / sp if model.num_experts else inner / tp
    return width * (wide + model.hidden_size / sp)


def _number_bytes(training: TrainingSettings) -> int:
    return 2 if training.bf16 else FLOAT32_BYTES


def _vocabulary(config: RunConfig) -> int:
    model = config.model
    assert model.vocab_size
    return padded_vocab_size(
        model.vocab_size, model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )


def describe_parts(memories: list[Memory]) -> Iterator[tuple[str, list[float]]]:
    """Yield each part's name and its GiB on every stage, the total last."""
    for name in (*(part.name for part in fields(Memory)), "total"):
        yield name, [getattr(memory, name) / 2**30 for memory in memories]
