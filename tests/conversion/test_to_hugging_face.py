"""An export's files besides the weights, its refusals and its memory."""

import json
import weakref

import pytest
import torch
import yaml

from megatron_tst.config import ModelSettings, RunConfig, UserError
from megatron_tst.conversion.safetensors_files import SafetensorsFolder
from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.conversion.to_hugging_face import EndOfDocument, Export
from megatron_tst.conversion.torch_dist import StackedWeights
from tests.checkpoint.saved import MODELS, VOCAB, build, change_contents, save
from tests.conversion.conftest import export

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

NORM = "decoder.final_layernorm.weight"


def folder_of(run):
    return next(run.checkpoints.glob("iter_*"))


def change_config(run, section, **values):
    path = folder_of(run) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[section] |= values
    path.write_text(yaml.safe_dump(config))


def assert_refused(run, tmp_path, message):
    with pytest.raises(UserError, match=message):
        run.export(tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))


def test_the_tokenizer_is_copied(saved, tmp_path):
    run = saved("llama")
    theirs = transformers.AutoTokenizer.from_pretrained(run.export(tmp_path / "hf"))
    text = "def f(x):\n    return x  # Ünïcode, 漢字 <|endoftext|> and   spaces\n"
    assert theirs(text)["input_ids"] == run.tokenizer.encode_batch([text])[0]
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == run.tokenizer.eod
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == run.tokenizer.eod


def test_the_tokenizers_own_settings_are_kept(saved, tmp_path):
    run = saved("llama")
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(run.tokenizer.path.read_bytes())
    kept = {"tokenizer_config.json": '{"eos_token": "<|endoftext|>"}', "generation_config.json": '{"top_k": 5}'}
    for name, content in kept.items():
        (source / name).write_text(content)
    (source / "weights.bin").write_text("not a tokenizer's")
    end = EndOfDocument(run.tokenizer.eod, "<|endoftext|>")
    Export(find_saved_checkpoint(run.checkpoints, None)).write(tmp_path / "hf", source / "tokenizer.json", end, 10**9)
    assert {name: (tmp_path / "hf" / name).read_text() for name in kept} == kept
    assert not (tmp_path / "hf" / "weights.bin").exists()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_weights_are_written_in_the_requested_type(saved, tmp_path, dtype, name):
    run = saved("qwen3")
    whole, short = (SafetensorsFolder(run.export(tmp_path / str(d), dtype=d)) for d in (None, dtype))
    for key in whole.weights:
        assert whole.read(key).dtype == torch.float32
        assert torch.equal(short.read(key), whole.read(key).to(dtype)), key
    assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["torch_dtype"] == name


def test_padding_is_not_exported(saved, tmp_path):
    run = saved("llama")
    assert run.model.output_layer.weight.shape[0] > VOCAB
    assert run.model.output_layer.weight[VOCAB:].isnan().all()
    weights = SafetensorsFolder(run.export(tmp_path / "hf"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights.weights[name].size == (VOCAB, 32) and not weights.read(name).isnan().any()


def test_only_one_weight_is_in_memory_at_a_time(saved, tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    while_reading, while_writing = [], []
    read = StackedWeights.read

    def counted(self, key, index):
        while_reading.append(len(alive))
        weight = read(self, key, index)
        alive.add(weight.untyped_storage())
        return weight

    monkeypatch.setattr(StackedWeights, "read", counted)
    run = saved("qwen3-moe")
    end = EndOfDocument(run.tokenizer.eod, "<|endoftext|>")
    export = Export(find_saved_checkpoint(run.checkpoints, None))
    export.write(
        tmp_path / "hf", run.tokenizer.path, end, 10**9, on_progress=lambda _: while_writing.append(len(alive))
    )
    assert set(while_writing) == {1}  # a weight that is kept too long would raise the count
    assert set(while_reading) == {0} and len(while_reading) == 2 + 4 * (7 + 2 * 4) + 1


def test_checkpoints_that_do_not_fit_their_settings_are_refused(saved, tmp_path):
    for number, (section, values, message) in enumerate(
        (
            (
                "model",
                {"hidden_size": 64},
                r"embeddings.weight: has shape \[304, 32\], but the settings need \[304, 64\]",
            ),
            ("model", {"num_layers": 5}, r"has shape \[4, 32\], but the settings need \[5, 32\]"),
            ("model", {"untie_embeddings_and_output_weights": False}, "output_layer.weight: is not in the table"),
            ("model", {"qk_layernorm": True}, "q?k_layernorm.weight: is missing, Qwen3ForCausalLM"),
            ("model", {"swiglu": False}, "--swiglu False: no Hugging Face architecture"),
            ("model", {"no_such": 1}, "no_such: is not a setting"),
        )
    ):
        run = saved("llama").copy(tmp_path / str(number))
        change_config(run, section, **values)
        assert_refused(run, tmp_path, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda entries: entries.update({"decoder.layers.mlp.linear_fc2.bias": entries[NORM]}),
            "linear_fc2.bias: is not in the table of its architecture, LlamaForCausalLM",
        ),
        (lambda entries: entries.pop(NORM), "decoder.final_layernorm.weight: is missing, LlamaForCausalLM"),
    ],
)
def test_unknown_and_missing_weights_are_named(saved, tmp_path, edit, message):
    run = saved("llama").copy(tmp_path / "checkpoints")
    change_contents(folder_of(run), lambda metadata: edit(metadata.state_dict_metadata))
    assert_refused(run, tmp_path, message)


def test_optimizer_tensors_are_ignored(saved, tmp_path):
    run = saved("llama").copy(tmp_path / "checkpoints")
    chained = "chained_1.optimizer.state.exp_avg.decoder.final_layernorm.weight"
    change_contents(folder_of(run), lambda m: m.state_dict_metadata.update({chained: m.state_dict_metadata[NORM]}))
    held = StackedWeights(folder_of(run)).entries
    assert {chained, "optimizer.state.exp_avg.output_layer.weight"} <= held.keys()
    exported, whole = (SafetensorsFolder(r.export(tmp_path / str(n))) for n, r in enumerate((run, saved("llama"))))
    assert exported.weights == whole.weights


def test_a_vocabulary_larger_than_the_embedding_is_refused(saved, tmp_path):
    run = saved("llama").copy(tmp_path / "checkpoints")
    state = json.loads((folder_of(run) / "run_state.json").read_text())
    (folder_of(run) / "run_state.json").write_text(json.dumps({**state, "vocab_size": 400}))
    assert_refused(run, tmp_path, "word_embeddings.weight: has 304 rows for 400 tokens")


@pytest.mark.parametrize("name", ["run_state.json", "config.yaml", ".metadata"])
def test_missing_files_are_named(saved, tmp_path, name):
    run = saved("llama").copy(tmp_path / "checkpoints")
    (folder_of(run) / name).unlink()
    assert_refused(run, tmp_path, f"{name}.*(is missing|No such file)")


@pytest.mark.parametrize(
    ("name", "content"), [("run_state.json", "{}"), ("run_state.json", "{"), ("config.yaml", ": :")]
)
def test_damaged_files_are_named(saved, tmp_path, name, content):
    run = saved("llama").copy(tmp_path / "checkpoints")
    (folder_of(run) / name).write_text(content)
    assert_refused(run, tmp_path, f"{name}.*(cannot be read|is not YAML|must hold sections)")


def test_values_that_overflow_the_type_are_refused(rank, tokenizer, tmp_path):
    (chunk,) = build(MODELS["llama"])
    run = RunConfig(model=ModelSettings(**MODELS["llama"]))
    weight = chunk.decoder.layers[2].mlp.linear_fc2.weight
    for value, name in ((70000.0, "large"), (torch.nan, "nan")):
        with torch.no_grad():
            weight[0, 0] = value
        save([chunk], tmp_path / name, run, str(tokenizer.path), rank)
    with pytest.raises(
        UserError, match=r"layers\.2\.mlp\.down_proj\.weight: holds 7e\+04, but the largest torch\.float16"
    ):
        export(tmp_path / "large", tmp_path / "hf", tokenizer, dtype=torch.float16)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))
    export(tmp_path / "large", tmp_path / "wide", tokenizer, dtype=torch.bfloat16)
    export_nan = Export(find_saved_checkpoint(tmp_path / "nan", None), torch.float16)
    export_nan.write(tmp_path / "hf", tokenizer.path, EndOfDocument(0, "<|endoftext|>"), 10**9)
    assert export_nan.casting.not_finite == ["model.layers.2.mlp.down_proj.weight"]
    assert export_nan.casting.rounded
