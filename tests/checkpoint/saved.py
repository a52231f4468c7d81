"""Checkpoints of small models in the layout of a run, saved by megatron-core under any parallel layout."""

import dataclasses
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_tst.config import ModelSettings, ParallelSettings, RunConfig, TrainingSettings, dump_config
from megatron_tst.model import LossChoice, TSTGPTModel, build_gpt, transformer_config
from megatron_tst.platform import ParallelSizes, find_libraries, join_ranks, leave_ranks, seed_everything
from megatron_tst.platform.safe_checkpoint import safe_loading
from megatron_tst.platform.shard_writer import ShardWriting, planning_for_threads

ITERATION, VOCAB = 12, 301

# Sizes that differ wherever they may: no transposition or mix-up of two of them fits.
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
    """This rank's model chunks, without wrappers, with weights that depend on nothing but their names."""
    parallel = parallel or ParallelSettings()
    settings = ModelSettings(**model)
    config = transformer_config(settings, TrainingSettings(bf16=bf16), parallel, find_libraries())
    virtual = config.virtual_pipeline_model_parallel_size
    def stage(number: int) -> TSTGPTModel:
        return build_gpt(
            config, settings, VOCAB, LossChoice(), use_transformer_engine=False,
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
    """Give each weight values that follow from its key and place alone; padding of the vocabulary is not a number."""

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
    # Large enough for every part of a layer to show in the logits.
    return torch.randn(size, generator=draw) * 0.2 + (1.0 if key.endswith("norm.weight") or "layer_norm" in key else 0.0)


def write_beside(checkpoints: Path, run: RunConfig, tokenizer: str) -> Path:
    """Make a run's folder of checkpoints of one whose tensors are to come; returns that one's folder."""
    folder = checkpoints / f"iter_{ITERATION:07}"
    folder.mkdir(parents=True, exist_ok=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    (folder / "config.yaml").write_text(dump_config(run))
    state = {"iteration": ITERATION, "vocab_size": VOCAB, "tokenizer": tokenizer}
    (folder / "run_state.json").write_text(json.dumps(state))
    return folder


def save(chunks: list[TSTGPTModel], folder: Path) -> None:
    """Save the model's tensors and, as an optimizer would, one that is not the model's."""
    state: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.output_layer.weight", torch.zeros(3))
    moment.replica_id = torch.distributed.get_rank()
    with planning_for_threads():
        request = dist_checkpointing.save(
            {**state, "optimizer": moment, "iteration": ITERATION}, folder, async_sharded_save=True
        )
    ShardWriting(request, keep_training=False).finish()


def change_contents(folder: Path, edit: Callable[[Any], object]) -> None:
    """Edit a checkpoint's table of contents."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def save_here(checkpoints: Path, name: str, tokenizer: str, bf16: bool = False) -> TSTGPTModel:
    """Save a model of one rank, in a process that has joined; returns it."""
    seed_everything(1)
    model = MODELS[name]
    run = RunConfig(model=ModelSettings(**model), training=TrainingSettings(bf16=bf16))
    (chunk,) = build(model, bf16=bf16)
    save([chunk], write_beside(checkpoints, run, tokenizer))
    return chunk.eval()


def save_layout(checkpoints: Path, name: str, tokenizer: str, parallel: ParallelSettings) -> None:
    """Save a model of several ranks; every rank calls it."""
    per_stage = parallel.num_layers_per_virtual_pipeline_stage
    stages = MODELS[name]["num_layers"] // parallel.pipeline_model_parallel_size // per_stage if per_stage else None
    sizes = {field.name for field in dataclasses.fields(ParallelSizes)} - {"virtual_pipeline_model_parallel_size"}
    ranks = join_ranks(
        ParallelSizes(**{s: getattr(parallel, s) for s in sizes}, virtual_pipeline_model_parallel_size=stages)
    )
    seed_everything(1)
    chunks = build(MODELS[name], parallel)
    run = RunConfig(model=ModelSettings(**MODELS[name]), parallel=parallel)
    if ranks.is_main:
        write_beside(checkpoints, run, tokenizer)
    torch.distributed.barrier()
    save(chunks, checkpoints / f"iter_{ITERATION:07}")
    leave_ranks()


def load_here(folder: Path, model: dict[str, Any]) -> TSTGPTModel:
    """Load a checkpoint's weights by megatron-core's own reader into a model of one rank."""
    (chunk,) = build(model)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)
    with safe_loading():
        loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, folder)
    chunk.load_state_dict(loaded["model"])
    return chunk.eval()
