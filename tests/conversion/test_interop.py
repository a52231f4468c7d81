"""Imported weights have the keys, shapes and common fields of stock Megatron-LM's checkpoints (core_v0.16.1)."""

import json

import pytest
import torch

from megatron_tst.conversion.to_megatron import Import
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata

pytest.importorskip("safetensors", reason="the extra hf is not installed")

DENSE = {
    "embedding.word_embeddings.weight": [304, 32],
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": [4, 32],
    "decoder.layers.self_attention.linear_qkv.weight": [4, (4 + 2 + 2) * 8, 32],
    "decoder.layers.self_attention.linear_proj.weight": [4, 32, 32],
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": [4, 32],
    "decoder.layers.mlp.linear_fc1.weight": [4, 2 * 40, 32],
    "decoder.layers.mlp.linear_fc2.weight": [4, 32, 40],
    "decoder.final_layernorm.weight": [32],
    "output_layer.weight": [304, 32],
}
QWEN3 = {
    **DENSE,
    "decoder.layers.self_attention.linear_qkv.weight": [4, (4 + 2 + 2) * 24, 32],
    "decoder.layers.self_attention.linear_proj.weight": [4, 32, 4 * 24],
    "decoder.layers.self_attention.q_layernorm.weight": [4, 24],
    "decoder.layers.self_attention.k_layernorm.weight": [4, 24],
}
EXPERTS = {
    # Transformer Engine's layers, Megatron-LM's default, keep this norm separate from the experts.
    "decoder.layers.pre_mlp_layernorm.weight": [4, 32],
    "decoder.layers.mlp.router.weight": [4, 4, 32],
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": [4, 4, 2 * 24, 32],
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": [4, 4, 32, 24],
}
KEYS = {
    "llama": DENSE,
    "llama-tied": {
        **{key: size for key, size in DENSE.items() if key != "output_layer.weight"},
        "decoder.layers.self_attention.linear_qkv.weight": [4, 3 * 32, 32],
    },
    "qwen3": QWEN3,
    "qwen3-moe": {**{key: size for key, size in QWEN3.items() if ".mlp." not in key}, **EXPERTS},
}
STATES = {
    "self_attention.linear_qkv": "4", "self_attention.linear_proj": "4", "self_attention.core_attention": "4",
    "mlp.linear_fc1": "4", "mlp.linear_fc2": "4",
    "mlp.experts.experts.linear_fc1": "4.4", "mlp.experts.experts.linear_fc2": "4.4",
}  # fmt: skip


def tensors(folder):
    """Return the sizes of all tensors except the optimizer's, by key."""
    entries = read_metadata(folder).state_dict_metadata.items()
    return {k: list(entry.size) for k, entry in entries if hasattr(entry, "size") and not k.startswith("optimizer.")}


@pytest.mark.parametrize("name", KEYS)
def test_weights_have_megatron_lms_keys_and_shapes(saved, name, tmp_path):
    run = saved(name)
    assert tensors(run.checkpoints / "iter_0000012") == KEYS[name]
    Import(run.export(tmp_path / "hf")).write(tmp_path / "weights", run.tokenizer.path)
    padded = {"embedding.word_embeddings.weight": [384, 32], "output_layer.weight": [384, 32]}
    imported = tensors(tmp_path / "weights" / "iter_0000000")
    assert imported == {key: padded.get(key, size) for key, size in KEYS[name].items()}


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_modules_have_the_extra_states_that_a_load_expects(saved, name, tmp_path):
    run = saved(name)
    Import(run.export(tmp_path / "hf")).write(tmp_path / "weights", run.tokenizer.path)
    found = {
        key for key in read_metadata(tmp_path / "weights" / "iter_0000000").state_dict_metadata if "_extra_state" in key
    }
    saved_keys = read_metadata(run.checkpoints / "iter_0000012").state_dict_metadata
    assert {key for key in saved_keys if "_extra_state" in key} <= found
    modules = {key.removeprefix("decoder.layers.").split("._extra_state")[0] for key in found}
    assert modules == {module for module in STATES if ("mlp" not in module) or ("experts" in module) == ("moe" in name)}
    for key in found:
        module, place = key.removeprefix("decoder.layers.").split("._extra_state/shard_")
        assert place.split("_")[1] == STATES[module]
    assert "decoder.layers.self_attention.core_attention._extra_state/shard_3_4" in found


def test_the_common_state_has_the_fields_that_a_load_needs(saved, tmp_path):
    run = saved("llama")
    Import(run.export(tmp_path / "hf")).write(tmp_path / "weights", run.tokenizer.path)
    folder = tmp_path / "weights" / "iter_0000000"
    assert (tmp_path / "weights" / "latest_checkpointed_iteration.txt").read_text() == "0"
    common = torch.load(folder / "common.pt", weights_only=True)
    assert common == {"checkpoint_version": 3.0, "iteration": 0}
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    saved_formats = json.loads((run.checkpoints / "iter_0000012" / "metadata.json").read_text())
    # megatron-core 0.19 and later omit values that were defaults in earlier versions.
    assert saved_formats.items() <= json.loads((folder / "metadata.json").read_text()).items()
    assert saved_formats["sharded_backend"] == "torch_dist"
