import types
from inspect import signature

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_tst.data.batches import BatchShape, make_batch, slice_for_context_parallel
from megatron_tst.superposition import bag_weights
from tests.reference import targets_of_text

EOD = 0


def shape(bag_size, length=6, weights="uniform", masked_after=None):
    return BatchShape(length, bag_size, bag_weights(weights, bag_size), masked_after)


@pytest.mark.parametrize("bag_size", [1, 4])
def test_batch_has_the_bags_targets_positions_and_weight_of_the_text(bag_size):
    text = torch.randint(1, 30, (3, 6 * bag_size + 1))
    batch = make_batch(text, shape(bag_size, weights="power_law"))
    targets = batch.labels.view(3, 6, bag_size)
    assert batch.inputs.flatten(1).tolist() == text[:, :-1].tolist()
    for row, sequence in enumerate(text.tolist()):
        assert targets[row].tolist() == targets_of_text(sequence, bag_size)
    assert batch.position_ids.tolist() == [list(range(6))] * 3
    weights = bag_weights("power_law", bag_size)
    expected = sum(float(weights[i]) for row in targets for bag in row for i, t in enumerate(bag) if t != -100)
    assert float(batch.weight) == pytest.approx(expected, rel=1e-6)


def test_bag_size_one_has_no_bag_axis():
    batch = make_batch(torch.randint(1, 30, (2, 7)), shape(1))
    assert batch.inputs.shape == batch.labels.shape == (2, 6)


@pytest.mark.parametrize("bag_size", [1, 3])
def test_token_after_the_end_of_a_document_is_not_predicted(bag_size):
    text = torch.randint(1, 30, (2, 6 * bag_size + 1))
    text[:, 4] = EOD
    batch = make_batch(text, shape(bag_size, masked_after=EOD))
    unmasked = make_batch(text, shape(bag_size))
    lost = (batch.labels != unmasked.labels).nonzero()
    assert len(lost) == 2
    assert torch.equal(unmasked.labels[tuple(lost.T)], text[:, 5])
    assert float(unmasked.weight - batch.weight) == pytest.approx(2 / bag_size, rel=1e-5)


# Since 0.18 megatron-core can also split sequences of very different lengths.
ORDINARY = {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}


@pytest.mark.parametrize("bag_size", [1, 4])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_parts_equal_megatron_cores(rank, monkeypatch, cp_size, bag_size):
    # Later versions of megatron-core ask torch for the rank in the group, which is a stand-in here.
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.size())
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank())
    batch = make_batch(torch.randint(1, 30, (3, 16 * bag_size + 1)), shape(bag_size, length=16))
    parts = [slice_for_context_parallel(batch, number, cp_size) for number in range(cp_size)]
    for number, part in enumerate(parts):
        group = types.SimpleNamespace(size=lambda: cp_size, rank=lambda number=number: number)
        fields = {name: getattr(batch, name) for name in ("inputs", "labels", "position_ids")}
        for name, wanted in get_batch_on_this_cp_rank(fields, **ORDINARY, cp_group=group).items():
            assert torch.equal(getattr(part, name), wanted), name
        assert part.weight is batch.weight
    order = torch.cat([part.position_ids for part in parts], dim=1).argsort(dim=1)
    labels = torch.cat([part.labels for part in parts], dim=1)
    assert torch.equal(torch.stack([row[o] for row, o in zip(labels, order, strict=True)]), batch.labels)


def test_shifting_after_the_context_parallel_split_gives_other_labels():
    """Labels that are folded within a chunk miss the next chunk's tokens, so its last labels would be wrong."""
    text = torch.randint(1, 30, (1, 16 * 4 + 1))
    whole = slice_for_context_parallel(make_batch(text, shape(4, length=16)), 0, 2)
    first_chunk = make_batch(text[:, : 4 * 4 + 1], shape(4, length=4))
    assert not torch.equal(whole.labels[:, :4], first_chunk.labels)


def test_single_tokens_predict_the_next_bag():
    text = torch.randint(1, 30, (2, 7))
    whole = BatchShape(6, 3, bag_weights("uniform", 3), reads_bags=False)
    batch = make_batch(text, whole)
    assert whole.num_tokens == 6
    assert torch.equal(batch.inputs, text[:, :-1])
    assert batch.labels[0, 0].tolist() == text[0, 1:4].tolist()
    assert batch.labels[0, -1].tolist() == [int(text[0, -1]), -100, -100]
    assert float(batch.weight) == pytest.approx(2 * (4 + 2 / 3 + 1 / 3), rel=1e-6)


def test_row_weight_of_mce_alt_is_one():
    text = torch.randint(1, 30, (2, 6 * 4 + 1))
    batch = make_batch(text, BatchShape(6, 4, bag_weights("uniform", 4), objective="mce_alt"))
    assert float(batch.weight) == 12
