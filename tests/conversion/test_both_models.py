"""Our model and transformers' model compute the same from one checkpoint, and a round trip preserves the weights."""

import dataclasses

import pytest
import torch

from megatron_tst.conversion import settings
from megatron_tst.conversion.tables import Row, Transformation
from megatron_tst.conversion.to_megatron import Import
from tests.checkpoint.saved import MODELS, VOCAB, load_here

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

TOKENS_BL = torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(7))
# bfloat16 rounds each position's loss up or down by some hundredths of a nat.
MANY_TOKENS_BL = torch.randint(0, VOCAB, (256, 65), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def our_logits(model, tokens_BL):
    places_BL = torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)
    return model(tokens_BL, places_BL, None)[..., :VOCAB]


@torch.no_grad()
def their_logits(folder, tokens_BL):
    # The type in config.json, which transformers 5 uses by default.
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()(tokens_BL).logits


def assert_same_loss(ours, theirs, tokens_BL):
    ours, theirs = (
        torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens_BL[:, 1:].flatten())
        for logits in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def assert_same_logits(ours, theirs):
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_in_float32(saved, name, tmp_path):
    run = saved(name)
    folder = run.export(tmp_path / "hf", max_shard_bytes=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_logits(our_logits(run.model, TOKENS_BL), their_logits(folder, TOKENS_BL))


@pytest.mark.parametrize("name", MODELS)
def test_next_token_loss_agrees_in_bfloat16(saved, name, tmp_path):
    run = saved(name, bf16=True)
    theirs = their_logits(run.export(tmp_path / "hf"), MANY_TOKENS_BL)
    assert theirs.dtype == torch.bfloat16
    assert_same_loss(our_logits(run.model, MANY_TOKENS_BL), theirs, MANY_TOKENS_BL)


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_preserves_the_weights(saved, name, tmp_path):
    run = saved(name)
    folder = run.export(tmp_path / "hf")
    Import(folder).write(tmp_path / "back", run.tokenizer.path)
    back = load_here(tmp_path / "back" / "iter_0000000", {**MODELS[name], "make_vocab_size_divisible_by": 128})
    found, wanted = dict(back.named_parameters()), dict(run.model.named_parameters())
    assert found.keys() == wanted.keys()
    for key, weight in wanted.items():
        padded = key in ("embedding.word_embeddings.weight", "output_layer.weight")
        rows = VOCAB if padded else len(weight)
        assert torch.equal(found[key][:rows], weight[:rows]), key
        assert not padded or not found[key][VOCAB:].any()
    again = run.export(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_model_written_by_transformers_is_imported(rank, tokenizer, name, saved, tmp_path):
    """The files come from the installed version of transformers."""
    config = transformers.AutoConfig.from_pretrained(saved(name).export(tmp_path / "like"))
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    Import(tmp_path / "hf").write(tmp_path / "weights", tokenizer.path)
    ours = load_here(tmp_path / "weights" / "iter_0000000", {**MODELS[name], "make_vocab_size_divisible_by": 128})
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, TOKENS_BL), theirs(TOKENS_BL).logits, rtol=0, atol=1e-5)


class ShiftedExperts(Row):
    """Return a wrong table, in which each expert has the name of the next."""

    def names(self, index):
        return super().names((index[0], (index[1] + 1) % 4))


def without_groups(weight, shape):
    return weight.split((shape.query, shape.groups * shape.head_width, shape.groups * shape.head_width))


def key_and_value_swapped(weight, shape):
    query, key, value = settings.LLAMA.rows[2].transformation.split(weight, shape)
    return query, value, key


def heads_transposed(weight, shape):
    query, *others = settings.LLAMA.rows[2].transformation.split(weight, shape)
    grouped = query.view(shape.groups, -1, shape.head_width, shape.hidden)
    return grouped.transpose(0, 1).flatten(0, 2), *others


def up_before_gate(weight, shape):
    return weight.chunk(2)[::-1]


@pytest.mark.parametrize(
    ("name", "row", "split"),
    [
        ("llama", "self_attention.linear_qkv.weight", without_groups),
        ("llama", "self_attention.linear_qkv.weight", key_and_value_swapped),
        ("qwen3", "self_attention.linear_qkv.weight", heads_transposed),
        ("llama", "mlp.linear_fc1.weight", up_before_gate),
        ("qwen3-moe", "experts.linear_fc1.weight", up_before_gate),
        ("qwen3-moe", "experts.linear_fc1.weight", ShiftedExperts),
        ("qwen3-moe", "experts.linear_fc2.weight", ShiftedExperts),
    ],
)
def test_a_wrong_table_changes_the_logits(saved, monkeypatch, name, row, split, tmp_path):
    def spoil(good: Row) -> Row:
        if not good.megatron.endswith(row):
            return good
        if split is ShiftedExperts:
            return ShiftedExperts(**{field.name: getattr(good, field.name) for field in dataclasses.fields(Row)})
        return dataclasses.replace(good, transformation=Transformation(split, good.transformation.join))

    spoilt = [dataclasses.replace(a, rows=tuple(map(spoil, a.rows))) for a in settings.ARCHITECTURES]
    monkeypatch.setattr(settings, "ARCHITECTURES", spoilt)
    run = saved(name)
    folder = run.export(tmp_path / "hf")
    ours, theirs = our_logits(run.model, TOKENS_BL), their_logits(folder, TOKENS_BL)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(ours, theirs)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_loss(ours, theirs, TOKENS_BL)
