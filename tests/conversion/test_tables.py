"""Each transformation, applied to weights whose rows encode their own meaning."""

import dataclasses

import pytest
import torch

from megatron_tst.config import ModelSettings
from megatron_tst.conversion.settings import ARCHITECTURES
from megatron_tst.conversion.tables import GATE_UP, QUERY_KEY_VALUE, SAME, VOCABULARY, pieces
from megatron_tst.shape import resolve_shape

SHAPE = resolve_shape(
    ModelSettings(
        num_layers=2, hidden_size=5, num_attention_heads=6, group_query_attention=True, num_query_groups=2,
        kv_channels=3, ffn_hidden_size=7, num_experts=4, moe_ffn_hidden_size=2, seq_length=8,
        vocab_size=11, make_vocab_size_divisible_by=16,
    )
)  # fmt: skip


def test_queries_keys_and_values_are_split_group_by_group():
    # megatron-core's order is a group's query heads, then its key head, then its value head.
    heads = ["q0", "q1", "q2", "k0", "v0", "q3", "q4", "q5", "k1", "v1"]
    rows = [f"{head}.{row}" for head in heads for row in range(SHAPE.kv_channels)]
    weight = torch.arange(len(rows)).unsqueeze(1).expand(-1, SHAPE.hidden_size).contiguous()
    parts = QUERY_KEY_VALUE.split(weight, SHAPE)
    for part, kind, number in zip(parts, "qkv", (6, 2, 2), strict=True):
        named = [rows[row] for row in part[:, 0].tolist()]
        assert named == [f"{kind}{head}.{row}" for head in range(number) for row in range(SHAPE.kv_channels)]


def test_gate_comes_before_up():
    gate, up = GATE_UP.split(torch.arange(14).unsqueeze(1), SHAPE)
    assert (gate[0], up[0]) == (0, 7)


def test_padding_is_removed_and_restored_as_zeros():
    weight = torch.randn(16, 5)
    (cut,) = VOCABULARY.split(weight, SHAPE)
    assert torch.equal(cut, weight[:11])
    back = VOCABULARY.join([cut], SHAPE)
    assert back.shape == (16, 5) and torch.equal(back[:11], cut) and not back[11:].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_join_inverts_split_in_every_row(architecture):
    shape = dataclasses.replace(SHAPE, padded_vocab_size=SHAPE.vocab_size)
    for row in architecture.rows:
        weight = torch.randn(row.megatron_size(shape))
        parts = row.transformation.split(weight, shape)
        assert len(parts) == len(row.hugging_face)
        assert [tuple(part.shape) for part in parts] == row.hugging_face_sizes(shape)
        assert torch.equal(row.transformation.join(parts, shape), weight)
        if row.transformation is not SAME and len(parts) > 1:
            swapped = row.transformation.join([parts[0], *reversed(parts[1:])], shape)
            assert len(parts) == 2 or not torch.equal(swapped, weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_weight_names_are_unique_and_layers_are_in_order(architecture):
    named = [name for row, index in pieces(architecture.rows, SHAPE) for name in row.names(index)]
    assert len(named) == len(set(named))
    assert named[0] == "model.embed_tokens.weight" and named[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in named[1:-2]]
    assert layers == sorted(layers) and set(layers) == {0, 1}
    experts = {name.split(".")[5] for name in named if ".experts." in name}
    assert experts == (set("0123") if architecture.experts else set())


def test_a_tied_head_has_no_row():
    rows = ARCHITECTURES[0].rows
    assert [row for row in rows if row not in ARCHITECTURES[0].rows_of(tied=True)] == [rows[-1]]
    assert ARCHITECTURES[0].rows_of(tied=False) == list(rows)
