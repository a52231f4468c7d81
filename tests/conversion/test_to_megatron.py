"""An import's support of published files, its refusals and the files that it writes."""

import json

import pytest
import torch

from megatron_tst.config import ModelSettings, UserError
from megatron_tst.conversion.safetensors_files import SafetensorsFolder
from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.conversion.to_megatron import Import
from megatron_tst.data.tokenizer import load_tokenizer
from tests.checkpoint.saved import MODELS
from tests.conversion.conftest import export

safetensors = pytest.importorskip("safetensors", reason="the extra hf is not installed")
pytest.importorskip("safetensors.torch")


@pytest.fixture
def hugging_face(saved, tmp_path):
    """Return a function that exports a model and returns the folder and a function that rewrites its weights."""

    def make(name: str):
        folder = saved(name).export(tmp_path / "hf")

        def change(**tensors):
            path = folder / "model.safetensors"
            merged = {**safetensors.torch.load_file(path), **tensors}
            safetensors.torch.save_file({key: value for key, value in merged.items() if value is not None}, path)

        return folder, change

    return make


def assert_refused(folder, message):
    with pytest.raises(UserError, match=message):
        Import(folder).write(folder / "out", folder / "tokenizer.json")
    assert not (folder / "out").exists() and not list(folder.glob(".*"))


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_preserves_the_settings(saved, hugging_face, name, tmp_path):
    folder, _ = hugging_face(name)
    Import(folder).write(tmp_path / "weights", folder / "tokenizer.json")
    run = find_saved_checkpoint(tmp_path / "weights", None)
    model, wanted = run.config.model, ModelSettings(**MODELS[name])
    settings = MODELS[name].keys() - {"seq_length", "make_vocab_size_divisible_by", "num_query_groups"}
    for setting in settings - {"moe_token_dispatcher_type"}:
        assert getattr(model, setting) == getattr(wanted, setting), setting
    assert model.num_query_groups == (wanted.num_query_groups if wanted.group_query_attention else 4)
    assert (run.vocab_size, model.max_position_embeddings, run.config.training.bf16) == (301, 16, False)
    assert run.tokenizer == tmp_path / "weights" / "tokenizer"
    assert (run.tokenizer / "tokenizer.json").read_bytes() == saved(name).tokenizer.path.read_bytes()


def test_the_type_of_the_weights_is_recorded_in_the_settings(saved, hugging_face, tmp_path):
    folder, _ = hugging_face("llama")
    Import(folder, torch.bfloat16).write(tmp_path / "weights", folder / "tokenizer.json")
    assert find_saved_checkpoint(tmp_path / "weights", None).config.training.bf16
    back = SafetensorsFolder(saved("llama").export(tmp_path / "short", dtype=torch.bfloat16))
    again = SafetensorsFolder(export(tmp_path / "weights", tmp_path / "again", saved("llama").tokenizer))
    assert all(torch.equal(again.read(key), back.read(key)) for key in back.weights)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(hugging_face, tmp_path):
    folder, change = hugging_face("llama-tied")
    embedding = SafetensorsFolder(folder).read("model.embed_tokens.weight")
    change(**{"lm_head.weight": embedding.clone()})
    Import(folder).write(tmp_path / "weights", folder / "tokenizer.json")
    assert b"output_layer.weight" not in (tmp_path / "weights" / "iter_0000000" / ".metadata").read_bytes()
    change(**{"lm_head.weight": embedding + 1})
    assert_refused(folder, r"lm_head\.weight: differs from model\.embed_tokens\.weight")


def test_buffers_that_follow_from_config_json_are_optional(hugging_face, tmp_path):
    folder, change = hugging_face("llama")
    change(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    Import(folder).write(tmp_path / "weights", folder / "tokenizer.json")


def test_a_tied_model_may_store_its_table_as_the_head(saved, hugging_face, tmp_path):
    folder, change = hugging_face("llama-tied")
    embedding = SafetensorsFolder(folder).read("model.embed_tokens.weight")
    change(**{"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    Import(folder).write(tmp_path / "weights", folder / "tokenizer.json")
    again = SafetensorsFolder(export(tmp_path / "weights", tmp_path / "again", saved("llama-tied").tokenizer))
    assert torch.equal(again.read("model.embed_tokens.weight"), embedding)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "qwen3-moe",
            {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 48, 32)},
            r"layers\.0\.mlp\.experts\.gate_up_proj: holds all experts of a layer",
        ),
        ("llama", {"model.norm.weight": None}, r"model\.norm\.weight: is missing, LlamaForCausalLM"),
        ("llama", {"model.norm.bias": torch.ones(32)}, r"model\.norm\.bias: is not in the table of its architecture"),
        ("llama", {"model.layers.4.mlp.up_proj.weight": torch.ones(40, 32)}, r"layers\.4\.mlp.* is not in the table"),
        (
            "qwen3-moe",
            {"model.layers.2.mlp.experts.3.down_proj.weight": None},
            r"layers\.2\.mlp\.experts\.3\.down_proj\.weight: is missing",
        ),
        (
            "qwen3",
            {"model.layers.1.self_attn.k_proj.weight": torch.ones(32, 48)},
            r"k_proj\.weight: has shape \[32, 48\], but config\.json needs \[48, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(hugging_face, name, tensors, message):
    folder, change = hugging_face(name)
    change(**tensors)
    assert_refused(folder, message)


def test_settings_that_do_not_fit_are_named(hugging_face):
    folder, _ = hugging_face("llama")
    path = folder / "config.json"
    contents = json.loads(path.read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, r"model\.layers\.3\.\S+: is not in the table"),
        ({"num_hidden_layers": 5}, r"model\.layers\.4\.\S+: is missing"),
        ({"vocab_size": 300}, r"embed_tokens\.weight: has shape \[301, 32\], but config\.json needs \[300, 32\]"),
        ({"model_type": "gpt2"}, "model_type 'gpt2': unknown architecture"),
    ):
        path.write_text(json.dumps({**contents, **change}))
        assert_refused(folder, message)
    for text in ("{", "[]"):
        path.write_text(text)
        assert_refused(folder, r"is not a Hugging Face folder: config\.json")
    path.unlink()
    assert_refused(folder, r"is not a Hugging Face folder: config\.json")


def test_special_tokens_survive_a_round_trip(saved, hugging_face, tmp_path):
    folder, _ = hugging_face("llama")
    ids = {"eos_token_id": [0, 2], "bos_token_id": 5, "pad_token_id": 6}
    contents = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**contents, **ids}))
    generation = '{"eos_token_id": [0, 2, 9], "top_k": 5}'
    (folder / "generation_config.json").write_text(generation)
    Import(folder).write(tmp_path / "weights", saved("llama").tokenizer.path)  # another tokenizer
    tokenizer = load_tokenizer(str(find_saved_checkpoint(tmp_path / "weights", None).tokenizer))
    again = export(tmp_path / "weights", tmp_path / "again", tokenizer)
    found = json.loads((again / "config.json").read_text())
    assert {key: found[key] for key in ids} == ids
    assert (again / "generation_config.json").read_text() == generation
    (tmp_path / "weights" / "tokenizer" / "generation_config.json").unlink()
    made = json.loads(
        (export(tmp_path / "weights", tmp_path / "third", tokenizer) / "generation_config.json").read_text()
    )
    assert made == ids
    # After further training the model ends its texts with the tokenizer's end-of-document token.
    path = tmp_path / "weights" / "tokenizer" / "token_ids.json"
    path.write_text(json.dumps({**ids, "eos_token_id": 2}))
    found = json.loads((export(tmp_path / "weights", tmp_path / "last", tokenizer) / "config.json").read_text())
    assert found["eos_token_id"] == [2, tokenizer.eod] == [2, 0]


def test_overflowing_values_are_refused_and_nan_is_recorded(hugging_face, tmp_path):
    folder, change = hugging_face("llama")
    norm = torch.ones(32)
    norm[3] = -65504.0
    change(**{"model.norm.weight": norm})
    Import(folder, torch.float16).write(tmp_path / "fits", folder / "tokenizer.json")
    norm[3] = -70000.0
    change(**{"model.norm.weight": norm})
    told = r"model\.norm\.weight: holds 7e\+04, but the largest torch\.float16 is 6\.55e\+04"
    with pytest.raises(UserError, match=told):
        Import(folder, torch.float16).write(tmp_path / "out", folder / "tokenizer.json")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    for value in (torch.nan, torch.inf):
        norm[3] = value
        change(**{"model.norm.weight": norm})
        weights = Import(folder, torch.float16)
        weights.write(tmp_path / str(value), folder / "tokenizer.json")
        assert weights.casting.not_finite == ["model.norm.weight"]
