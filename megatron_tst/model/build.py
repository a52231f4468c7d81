"""Builds the model chunks of this rank from the settings, wrapped for mixed precision and data parallelism."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_tst.config import ModelSettings, ParallelSettings, RunConfig, TrainingSettings
from megatron_tst.distributed import ParallelState
from megatron_tst.megatron_patches import Libraries
from megatron_tst.megatron_patches.versions import without_cuda_graphs
from megatron_tst.model.gpt import TSTGPTModel
from megatron_tst.model.layers import block_spec
from megatron_tst.model.linear_loss import check_torch
from megatron_tst.model.loss import LossChoice, LossImplementation
from megatron_tst.model.te_loss import load_kernel
from megatron_tst.shape import ModelShape, virtual_stages


def transformer_config(
    model: ModelSettings,
    shape: ModelShape,
    training: TrainingSettings,
    parallel: ParallelSettings,
    libraries: Libraries,
) -> TransformerConfig:
    """Translate settings into megatron-core's configuration.

    Args:
        model: settings of the model.
        shape: sizes that follow from the settings.
        training: settings of precision, recomputation and initialisation.
        parallel: parallel layout.
        libraries: installed libraries with fused kernels.
    """
    has_te = libraries.transformer_engine is not None
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return TransformerConfig(
        **_layers(model, shape),
        **_mixture_of_experts(model, shape, has_te),
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=training.attention_softmax_in_fp32,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        deterministic_mode=training.deterministic_mode,
        use_cpu_initialization=training.use_cpu_initialization,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(shape.num_layers, parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        deallocate_pipeline_outputs=True,
        **without_cuda_graphs(),
        # Only the accelerator libraries have these kernels.
        gradient_accumulation_fusion=libraries.gradient_accumulation_fusion,
        bias_activation_fusion=has_te,
        bias_dropout_fusion=has_te,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=has_te,
    )


def _layers(model: ModelSettings, shape: ModelShape) -> dict[str, Any]:
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": model.swiglu,
        "activation_func": torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        "add_bias_linear": not model.disable_bias_linear,
        "qk_layernorm": model.qk_layernorm,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "init_method_std": model.init_method_std,
    }


def _mixture_of_experts(model: ModelSettings, shape: ModelShape, has_te: bool) -> dict[str, Any]:
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        # The softmax runs over the chosen experts, so their probabilities sum to 1.
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
        "moe_token_drop_policy": model.moe_token_drop_policy,
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_grouped_gemm": model.moe_grouped_gemm and has_te,
        "moe_permute_fusion": has_te,
    }


def build_gpt(
    config: TransformerConfig,
    model: ModelSettings,
    shape: ModelShape,
    loss: LossChoice,
    use_transformer_engine: bool,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    model_class: type = TSTGPTModel,
) -> TSTGPTModel:
    """Build one pipeline stage of the model, without wrappers.

    Args:
        config: megatron-core's configuration.
        model: settings of the position embedding.
        shape: sizes of the vocabulary and the positions, and whether the output layer is tied.
        loss: loss to compute from labels.
        use_transformer_engine: whether to use Transformer Engine's layers.
        pre_process: whether the stage holds the embedding.
        post_process: whether the stage holds the output layer.
        vp_stage: index of the virtual pipeline stage; None if stages are not interleaved.
        model_class: class to build.
    """
    stage: TSTGPTModel = model_class(
        config=config,
        transformer_layer_spec=block_spec(config, use_transformer_engine, vp_stage),
        vocab_size=shape.padded_vocab_size,
        real_vocab_size=shape.vocab_size,
        loss=loss,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    return stage


def loss_choice(run: RunConfig, libraries: Libraries) -> LossChoice:
    """Return the loss that the settings ask for; the default is Transformer Engine's kernel if it is installed.

    Raises:
        UserError: if the loss is ``te`` and Transformer Engine is missing or of an unsupported version, or the loss is
            ``linear`` and torch is too old for it.
    """
    default: LossImplementation = "native" if libraries.transformer_engine is None else "te"
    implementation = run.training.cross_entropy_fusion_impl or default
    if implementation == "te":
        load_kernel()
    if implementation == "linear" and run.training.bf16 and torch.cuda.is_available():
        check_torch(torch.__version__)
    return LossChoice(run.superposition.loss_weights, run.superposition.tst_objective, implementation)


def reduce_experts_apart(chunk: torch.nn.Module) -> None:
    """Mark the experts so that their gradients are summed over the ranks that hold the same experts, on every layout.

    megatron-core marks experts only if expert parallelism distributes them. Tensor-parallel ranks hold whole experts
    (expert tensor parallelism is 1) and route different positions to them, so experts are data-parallel there too.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def build_model(
    run: RunConfig, shape: ModelShape, ranks: ParallelState, libraries: Libraries
) -> list[DistributedDataParallel]:
    """Build this rank's model chunks: one, or one per virtual pipeline stage.

    Collective: every rank of the world calls it.

    Args:
        run: settings of the run.
        shape: sizes of the model on this layout.
        ranks: parallel state of this rank.
        libraries: installed libraries with fused kernels.

    Returns:
        The chunks, wrapped in megatron-core's Float16Module (with bf16) and DistributedDataParallel.
    """
    config = transformer_config(run.model, shape, run.training, run.parallel, libraries)
    virtual = config.virtual_pipeline_model_parallel_size
    last = (virtual or 1) - 1
    chunks = []
    for stage in range(virtual or 1):
        chunk = build_gpt(
            config,
            run.model,
            shape,
            loss_choice(run, libraries),
            use_transformer_engine=libraries.transformer_engine is not None,
            pre_process=ranks.is_first_stage and stage == 0,
            post_process=ranks.is_last_stage and stage == last,
            vp_stage=stage if virtual else None,
        )
        reduce_experts_apart(chunk)
        chunks.append(chunk.to(torch.cuda.current_device()))
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=run.training.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather,
        # Interleaved stages start to gather together, when the schedule says so, not when each stage's modules run.
        align_param_gather=run.parallel.overlap_param_gather and virtual is not None,
        bucket_size=run.parallel.ddp_bucket_size,
        use_distributed_optimizer=run.optimizer.use_distributed_optimizer,
    )
    return [
        # Buckets serve the overlap only from the first chunk's backward pass on, so the later chunks have one bucket.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
