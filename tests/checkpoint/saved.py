"""Checkpoints of small models in the layout of a run, saved by megatron-core under any parallel layout."""

import dataclasses
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.run_state import RunState
from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import ModelSettings, ParallelSettings, RunConfig, TrainingSettings, dump_config
from megatron_tst.distributed import (
    ParallelSizes,
    ParallelState,
    destroy_parallel_state,
    init_parallel_state,
    seed_everything,
)
from megatron_tst.megatron_patches import find_libraries
from megatron_tst.megatron_patches.safe_checkpoint import safe_loading
from megatron_tst.model import LossChoice, TSTGPTModel, build_gpt, transformer_config
from megatron_tst.shape import resolve_shape
from megatron_tst.superposition import Phase, Schedule

ITERATION, VOCAB = 12, 301

# The sizes are all different if possible, so that transposing or confusing two of them fails.
LLAMA: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": 16,
    "position_embedding_type": "rope",
    "rotary_base": 5000,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-3,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "disable_bias_linear": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "untie_embeddings_and_output_weights": False, "group_query_attention": False},
    "qwen3": {**LLAMA, "qk_layernorm": True, "kv_channels": 24},
    "qwen3-moe": {
        **LLAMA,
        "qk_layernorm": True,
        "kv_channels": 24,
        "num_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.01,
        "moe_token_dispatcher_type": "alltoall",
    },
}


def build(model: dict[str, Any], parallel: ParallelSettings | None = None, bf16: bool = False) -> list[TSTGPTModel]:
    """Return this rank's model chunks, not wrapped, with weights that depend only on their names."""
    parallel = parallel or ParallelSettings()
    settings = ModelSettings(**model)
    shape = resolve_shape(settings, VOCAB, parallel)
    config = transformer_config(settings, shape, TrainingSettings(bf16=bf16), parallel, find_libraries())
    virtual = config.virtual_pipeline_model_parallel_size

    def stage(number: int) -> TSTGPTModel:
        return build_gpt(
            config, settings, shape, LossChoice(), use_transformer_engine=False,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=True) and number == 0,
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=True) and number == (virtual or 1) - 1,
            vp_stage=number if virtual else None,
        )  # fmt: skip

    chunks = [stage(number) for number in range(virtual or 1)]
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks = [chunk.to(dtype) for chunk in chunks]
    fill(chunks)
    return chunks


def fill(chunks: list[TSTGPTModel]) -> None:
    """Fill each weight with values that depend only on its key and offset; the vocabulary's padding is NaN."""

    def visit(node: Any) -> None:
        if isinstance(node, ShardedTensorFactory):
            visit(node.build())
        elif isinstance(node, ShardedTensor):
            slot = tuple(slice(start, start + n) for start, n in zip(node.global_offset, _sizes(node), strict=True))
            node.data.copy_(_whole(node.key, node.global_shape)[slot].reshape(node.data.shape))
        elif isinstance(node, dict | list | tuple):
            for child in node.values() if isinstance(node, dict) else node:
                visit(child)

    with torch.no_grad():
        for chunk in chunks:
            visit(chunk.sharded_state_dict())


def _sizes(tensor: ShardedTensor) -> tuple[int, ...]:
    return (*(1 for _ in range(len(tensor.global_offset) - tensor.data.dim())), *tensor.data.shape)


def _whole(key: str, size: tuple[int, ...]) -> Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        real = torch.randn(VOCAB, size[1], generator=draw) * 0.2
        return torch.cat((real, torch.full((size[0] - VOCAB, size[1]), torch.nan)))
    # The values are large enough for every part of a layer to affect the logits.
    around = 1.0 if "norm" in key else 0.0
    return around + 0.2 * torch.randn(size, generator=draw)


def save(chunks: list[TSTGPTModel], checkpoints: Path, run: RunConfig, tokenizer: str, ranks: ParallelState) -> None:
    """Save the model's tensors and one tensor of an optimizer."""
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.output_layer.weight", torch.zeros(3))
    moment.replica_id = ranks.rank
    content = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    state = RunState(
        iteration=ITERATION, schedule=Schedule((Phase(1, ITERATION),)), samples_per_phase=(ITERATION,),
        global_batch_size=1, vocab_size=VOCAB, tokenizer=tokenizer, tokenizer_sha256="", sources=[],
        layout=ranks.layout, is_permanent=False, versions={},
    )  # fmt: skip
    folders = CheckpointFolders(checkpoints)
    saver = CheckpointSaver(folders, ranks, dump_config(run), keep_training=False, keep_last=None)
    saver.save(state, lambda: {**content, "optimizer": moment, "iteration": ITERATION})


def change_contents(folder: Path, edit: Callable[[Any], object]) -> None:
    """Edit a checkpoint's table of contents."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def save_here(checkpoints: Path, name: str, tokenizer: str, ranks: ParallelState, bf16: bool = False) -> TSTGPTModel:
    """Save a model on one rank, in a process that has joined megatron-core's groups; return the model."""
    seed_everything(1)
    (chunk,) = build(MODELS[name], bf16=bf16)
    run = RunConfig(model=ModelSettings(**MODELS[name]), training=TrainingSettings(bf16=bf16))
    save([chunk], checkpoints, run, tokenizer, ranks)
    return chunk.eval()


def save_layout(checkpoints: Path, name: str, tokenizer: str, parallel: ParallelSettings) -> None:
    """Save a model on several ranks; every rank calls it."""
    per_stage = parallel.num_layers_per_virtual_pipeline_stage
    stages = MODELS[name]["num_layers"] // parallel.pipeline_model_parallel_size // per_stage if per_stage else None
    sizes = {field.name for field in dataclasses.fields(ParallelSizes)} - {"virtual_pipeline_model_parallel_size"}
    ranks = init_parallel_state(
        ParallelSizes(**{s: getattr(parallel, s) for s in sizes}, virtual_pipeline_model_parallel_size=stages)
    )
    seed_everything(1)
    run = RunConfig(model=ModelSettings(**MODELS[name]), parallel=parallel)
    save(build(MODELS[name], parallel), checkpoints, run, tokenizer, ranks)
    destroy_parallel_state()


def load_here(folder: Path, model: dict[str, Any]) -> TSTGPTModel:
    """Load a checkpoint's weights with megatron-core's own reader into a model on one rank."""
    (chunk,) = build(model)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)
    with safe_loading():
        loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, folder)
    chunk.load_state_dict(loaded["model"])
    return chunk.eval()
