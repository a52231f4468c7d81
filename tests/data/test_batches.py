import pytest
import torch

from megatron_tst.data.batches import BatchShape, make_batch
from megatron_tst.superposition import bag_weights
from tests.reference import targets_of_text

EOD = 0


def shape(bag_size, length=6, weights="uniform", masked_after=None):
    return BatchShape(length, bag_size, bag_weights(weights, bag_size), masked_after)


@pytest.mark.parametrize("bag_size", [1, 4])
def test_text_becomes_bags_targets_positions_and_weight(bag_size):
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
def test_nothing_is_predicted_after_the_end_of_a_document(bag_size):
    text = torch.randint(1, 30, (2, 6 * bag_size + 1))
    text[:, 4] = EOD
    batch = make_batch(text, shape(bag_size, masked_after=EOD))
    unmasked = make_batch(text, shape(bag_size))
    lost = (batch.labels != unmasked.labels).nonzero()
    assert len(lost) == 2
    assert torch.equal(unmasked.labels[tuple(lost.T)], text[:, 5])
    assert float(unmasked.weight - batch.weight) == pytest.approx(2 / bag_size, rel=1e-5)
