"""The exported files are the same bytes for every parallel layout that saved the checkpoint."""

import pytest
import torch

from megatron_tst.config import ParallelSettings
from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from tests.checkpoint.saved import save, save_layout
from tests.conversion.conftest import export
from tests.distributed.launch import run_distributed

pytestmark = pytest.mark.distributed

# name: (model, world size, layout)
LAYOUTS = {
    "tp2-pp2": ("llama", 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2-pp2-tied": ("llama-tied", 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp2-interleaved-dp2": (
        "qwen3",
        4,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "ep2-tp2-sp": (
        "qwen3-moe",
        4,
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_exports_the_same_bytes_as_one_rank(saved, layout, tmp_path):
    name, world_size, parallel = LAYOUTS[layout]
    run = saved(name)
    run_distributed(
        save_layout, world_size, tmp_path / "checkpoints", name, str(run.tokenizer.path), ParallelSettings(**parallel)
    )
    assert len(list((tmp_path / "checkpoints").glob("iter_*/*.distcp"))) > 2
    ranks = contents(export(tmp_path / "checkpoints", tmp_path / "hf", run.tokenizer, max_shard_bytes=50_000))
    assert ranks == contents(run.export(tmp_path / "alone", max_shard_bytes=50_000))


def test_one_changed_weight_changes_the_bytes(saved, rank, tmp_path):
    run = saved("qwen3-moe")
    weight = run.model.decoder.layers[3].mlp.experts.local_experts[2].linear_fc2.weight
    config = find_saved_checkpoint(run.checkpoints, None).config
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[5, 7] += 1
        save([run.model], tmp_path / "checkpoints", config, str(run.tokenizer.path), rank)
        weight.copy_(kept)
    changed = contents(export(tmp_path / "checkpoints", tmp_path / "hf", run.tokenizer))
    whole = contents(run.export(tmp_path / "alone"))
    assert [name for name in whole if changed[name] != whole[name]] == ["model.safetensors"]
